"""SmoothQuant (arXiv 2211.10438): range moves from activations into the weights that read them, channel by channel.

Dividing channel j by s_j where it is made, and multiplying it by s_j in the weights that read it, leaves the function
as it is: `y = (x / s) (s W)^T`. Which links of channels hold is tried on the network with powers of two, to the bit;
the factors themselves are free, and what they change in the float output is rounding, which is measured and told.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.channels import Channels, Link
from lit_clipq.calibration.needs import Need, Write
from lit_clipq.calibration.scaling import ChannelScaling
from lit_clipq.distributed import gather
from lit_clipq.errors import ConfigError
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.products import ReaderError
from lit_clipq.stages.proof import links_that_hold, output_change
from lit_clipq.stages.stage import FloatStage, Report, stage

log = logging.getLogger(__name__)

_LARGEST = 2.0**16  # of a factor, and the inverse of the smallest
_TOLERANCE = 1e-5  # relative, of the float output


@stage("smooth")
@dataclass(frozen=True)
class Smooth(FloatStage):
    """Smooth the channels that layers read, `s_j = max|X_j|^a / max|W_j|^(1 - a)` with W over all readers of a link.

    Links are: LayerNorm to the projections that read it, values to the output projection of their attention,
    convolution through ReLU and pooling to the next one, and the free branch of a gated MLP to its second layer. A
    layer behind a LayerNorm that others read, too, as the final projection of a tower, divides its input itself.

    Of the shares a that are offered the one with the least squared error of the readers' products is taken, with
    min-max grids of the recipe's kind and widths on a sample of calibration rows. On rows of that sample that took no
    part in the choice it must be better than no smoothing, or the link stays as it is.
    """

    needs = frozenset({Need.LINKS, Need.OUTPUTS})
    writes = frozenset({Write.NORMS, Write.WEIGHTS})
    in_place = False

    alpha: float | None = None
    """Share a of the activations, 0 to 1; `null` searches it link by link."""
    steps: int = 10
    """How many steps a search takes from 0 to 1, both ends included."""
    divide_inputs: bool = True
    """Whether layers behind a LayerNorm that others read divide their own input at run time, in float."""

    convolutions: float = 0.5
    """Share of their error below which links between convolutions are smoothed; 0 leaves all of them. Smaller gains of
    theirs do not reach the task: at 4 bits they cost the mini ResNet 2 points of recall."""

    def __post_init__(self) -> None:
        if not 0 <= self.convolutions <= 1:
            raise ConfigError(f"convolutions of smooth must be at least 0 and at most 1, got {self.convolutions}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"alpha of smooth must be at least 0 and at most 1, or null to search it, got {self.alpha}"
            )
        if not 1 <= self.steps <= 100:
            raise ConfigError(f"steps of smooth must be at least 1 and at most 100, got {self.steps}")

    @property
    def offered(self) -> tuple[float, ...]:
        """The shares a that are tried."""
        return tuple(i / self.steps for i in range(self.steps + 1)) if self.alpha is None else (self.alpha,)

    @torch.no_grad()
    def rewrite(self, draft: Draft) -> Report:
        """Smooth the channels of a draft.

        Returns:
            By link (its maker, or the layer that divides its own input): the share a, `None` where it stays as it is
            with the reason, and squared error of the readers' products on rows held out, before and after. By
            `float outputs`: the largest relative change of the float outputs.
        """
        report: dict[str, Any] = {}
        chosen: dict[Link, tuple[Tensor, dict[str, Any]]] = {}
        for link in draft.links.links:
            factors, told = self._choose(draft, link)
            if factors is None:
                report[_named(link)] = told
            else:
                chosen[link] = factors, told
        chosen, report = gather((chosen, report))[0]  # the same on every rank, to the bit
        safe = {link for link in chosen if link.at_reader}
        tried = [link for link in chosen if link not in safe]
        safe |= links_that_hold(draft, tried, [len(chosen[link][0]) for link in tried])
        draft.scale([ChannelScaling(link, factors) for link, (factors, _) in chosen.items() if link in safe])
        for link, (_, told) in chosen.items():
            report[_named(link)] = told if link in safe else _left("something else reads these channels")
        change = output_change(draft, scale=True)
        if change > _TOLERANCE:
            log.warning("smoothing changes the float outputs by %.1e of the largest, expected %.0e", change, _TOLERANCE)
        return {**report, "float outputs": {"relative change": change}}

    def _choose(self, draft: Draft, link: Link) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the factors of a link, or `None` with the reason."""
        if link.at_reader and not self.divide_inputs:
            return None, _left("others read the LayerNorm, and divide_inputs is false")
        widths = {entry.name: entry for entry in draft.plan.quantized}
        quantized = [name for name in link.readers if name in widths]
        if not quantized or (link.at_reader and len(quantized) < len(link.readers)):
            return None, _left("its readers are not quantized")
        seen = draft.links
        readers = [(draft.parameters(name)[0], seen.channels[name]) for name in link.readers]
        fit = [ReaderError(draft, widths[name], seen, held_out=False) for name in quantized]
        offers = [smoothing_factors(readers, alpha) for alpha in self.offered]
        errors = [sum(reader(factors) for reader in fit) for factors in offers]
        best = min(range(len(offers)), key=errors.__getitem__)
        held_out = [ReaderError(draft, widths[name], seen, held_out=True) for name in quantized]
        nothing = torch.ones_like(offers[best])
        before, after = (sum(reader(factors) for reader in held_out) for factors in (nothing, offers[best]))
        maps = isinstance(draft.session.layer[link.readers[0]].module, nn.Conv2d)
        if not after < (self.convolutions if maps else 1) * before:
            return None, {**_left("no share is better on rows held out"), "before": before, "after": before}
        return offers[best], {"alpha": self.offered[best], "before": before, "after": after}


def smoothing_factors(readers: Sequence[tuple[Tensor, Channels]], alpha: float) -> Tensor:
    """Return `s_j = max|X_j|^a / max|W_j|^(1 - a)`, equation 4 of arXiv 2211.10438.

    Args:
        readers: Weight (out, channels, *) of each layer that reads the channels, and what it reads.
        alpha: The share a.

    Returns:
        (channels,), float64 on the CPU, between 2^-16 and 2^16; 1 for channels that are zero in X or W.

    Example:
        >>> seen = Channels.of(torch.tensor([[-8.0, 1.0], [2.0, 0.0]]))
        >>> smoothing_factors([(torch.tensor([[0.5, 1.0]]), seen)], 0.5).tolist()
        [4.0, 1.0]
    """
    magnitude = torch.stack([torch.maximum(-seen.low, seen.high) for _, seen in readers]).amax(0).double()
    largest = torch.stack([w.abs().transpose(0, 1).flatten(1).amax(1).double().cpu() for w, _ in readers]).amax(0)
    alive = (magnitude > 0) & (largest > 0)
    factors = torch.ones_like(magnitude)
    factors[alive] = magnitude[alive] ** alpha / largest[alive] ** (1 - alpha)
    return factors.clamp(1 / _LARGEST, _LARGEST)


def _named(link: Link) -> str:
    return link.readers[0] if link.at_reader else link.maker


def _left(reason: str) -> dict[str, Any]:
    return {"alpha": None, "reason": reason}
