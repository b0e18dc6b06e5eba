"""Whether links of channels hold, tried on the network: scaled by powers of two it must return the same bits."""

import logging
from collections.abc import Sequence

import torch

from lit_clipq.calibration.channels import Link
from lit_clipq.calibration.scaling import ChannelScaling, scaled
from lit_clipq.distributed import gather
from lit_clipq.stages.draft import Draft

log = logging.getLogger(__name__)


def that_hold(draft: Draft, chosen: Sequence[ChannelScaling]) -> list[ChannelScaling]:
    """Return the scalings with which the outputs stay the same to the bit; a collective call.

    Where they do not, something else reads the channels; each half is tried by itself, with a run of one batch each,
    until those that can stay are found.

    Args:
        draft: Whose network, its own scalings aside, is run.
        chosen: Factors are powers of two.
    """
    if not chosen:
        return []
    session = draft.session
    with scaled(session.modules, chosen):
        after = session.outputs_now()
    if all(gather(all(torch.equal(x, y) for x, y in zip(session.outputs, after, strict=True)))):
        return list(chosen)
    middle = len(chosen) // 2
    halves = (chosen[:middle], chosen[middle:]) if middle else ()
    return [scaling for half in halves for scaling in that_hold(draft, half)]


def links_that_hold(draft: Draft, links: Sequence[Link], channels: Sequence[int]) -> set[Link]:
    """Return the links whose channels nothing but their readers read; a collective call.

    Args:
        draft: Whose network is run, with every other channel divided by 2 and the rest by 4.
        links: What to try.
        channels: How many channels each has.
    """
    tried = [
        ChannelScaling(link, 2.0 ** (1 + torch.arange(count, dtype=torch.float64) % 2))
        for link, count in zip(links, channels, strict=True)
    ]
    return {scaling.link for scaling in that_hold(draft, tried)}


def output_change(draft: Draft, *, scale: bool = False) -> float:
    """Return by how much the outputs differ from those that were seen, relative to the largest; a collective call.

    Args:
        draft: Whose network is run as it is at this moment.
        scale: Whether its channels are scaled meanwhile.
    """
    session = draft.session
    before = session.outputs
    with scaled(session.modules, draft.scalings if scale else ()):
        after = session.outputs_now()
    own = [
        float((x - y).abs().max() / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny))
        for x, y in zip(before, after, strict=True)
    ]
    return max((change for changes in gather(own) for change in changes), default=0.0)
