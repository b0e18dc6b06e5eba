"""RepQ-ViT (arXiv 2212.08254): a grid for each channel behind a LayerNorm, folded so that one grid serves all of them.

With scale s_j and zero point z_j of each channel, S the mean of s, Z that of z, rounded, `r = s / S`, `b = S (Z - z)`,
the LayerNorm gets gain / r and bias / r - b, what reads it `W r` and `bias + (W r) b`. Every channel then spans the one
grid (S, Z) exactly; the weights, whose columns were multiplied, get their grids anew behind this stage.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.channels import Channels, Link
from lit_clipq.calibration.needs import Need, Write
from lit_clipq.calibration.scaling import multiplied
from lit_clipq.distributed import gather
from lit_clipq.nn.structure import float_bias
from lit_clipq.nn.swap import FLOAT_BITS
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.products import ReaderError
from lit_clipq.stages.proof import links_that_hold, output_change
from lit_clipq.stages.stage import FloatStage, Report, stage

log = logging.getLogger(__name__)

_TOLERANCE = 1e-5  # relative, of the float output


@dataclass(frozen=True)
class Reparameterization:
    """What becomes of the channels behind a LayerNorm: `x <- x / ratio - shift`."""

    ratio: Tensor
    """r, float64 (channels,) on the CPU, positive."""
    shift: Tensor
    """b, float64 (channels,) on the CPU."""


@stage("repq")
@dataclass(frozen=True)
class RepQ(FloatStage):
    """Fold a grid for each channel behind the LayerNorms of every block into gain, bias and the layers that read them.

    A link is left as it is where the squared error of its readers' products on calibration rows, with min-max grids of
    the recipe's kind and widths, is not smaller with it, or where something else reads the channels.
    """

    needs = frozenset({Need.LINKS, Need.OUTPUTS})
    writes = frozenset({Write.NORMS, Write.WEIGHTS, Write.BIAS})

    @torch.no_grad()
    def rewrite(self, draft: Draft) -> Report:
        """Rewrite the LayerNorms of a draft and what reads them.

        Returns:
            By LayerNorm: squared error of the readers' products on rows, before and after, or the reason why it stays;
            by `float outputs` their largest relative change.
        """
        report: dict[str, Any] = {}
        chosen: dict[Link, tuple[Reparameterization, dict[str, Any]]] = {}
        for link in draft.links.links:
            norm = draft.session.modules.get(link.maker)
            if not isinstance(norm, nn.LayerNorm) or link.at_reader:
                continue
            found, told = self._choose(draft, link, norm)
            if found is None:
                report[link.maker] = told
            else:
                chosen[link] = found, told
        chosen, report = gather((chosen, report))[0]  # the same on every rank, to the bit
        holding = links_that_hold(draft, list(chosen), [len(found.ratio) for found, _ in chosen.values()])
        for link, (found, told) in chosen.items():
            report[link.maker] = told if link in holding else _left("something else reads these channels")
            if link in holding:
                _fold(draft, link, found)
        change = output_change(draft)
        if change > _TOLERANCE:
            log.warning("folding changes the float outputs by %.1e of the largest, expected %.0e", change, _TOLERANCE)
        return {**report, "float outputs": {"relative change": change}}

    @staticmethod
    def _choose(draft: Draft, link: Link, norm: nn.LayerNorm) -> tuple[Reparameterization | None, dict[str, Any]]:
        """Return what becomes of a link's channels, or `None` with the reason."""
        widths = {entry.name: entry for entry in draft.plan.quantized}
        quantized = [name for name in link.readers if name in widths]
        bits = {widths[name].activation_bits for name in quantized}
        if not quantized or bits == {FLOAT_BITS}:
            return None, _left("what its readers read is not quantized")
        if len(bits) > 1:
            return None, _left("its readers have activations of several widths")
        if norm.bias is None:
            return None, _left("the LayerNorm has no bias")
        seen = draft.links
        found = reparameterized([seen.channels[name] for name in quantized], bits.pop())
        held_out = [ReaderError(draft, widths[name], seen, held_out=True) for name in quantized]
        before = sum(reader(torch.ones_like(found.ratio)) for reader in held_out)
        after = sum(reader(found.ratio, found.shift) for reader in held_out)
        told = {"before": before, "after": after}
        return (found, told) if after < before else (None, {**_left("its error is not smaller"), **told})


def reparameterized(read: Sequence[Channels], bits: int) -> Reparameterization:
    """Return the ratios and shifts that give every channel the same range, equations 7 to 9 of arXiv 2212.08254.

    Args:
        read: What each reader of the channels reads.
        bits: Width of their input.

    Returns:
        For channels without a range a ratio of 1 and their minimum.

    Example:
        >>> seen = Channels.of(torch.tensor([[0.0, -6.0], [15.0, 24.0]]))
        >>> found = reparameterized([seen], 4)  # scales 1 and 2, zero points 0 and 3
        >>> found.ratio.tolist(), found.shift.tolist()
        ([0.6666666666666666, 1.3333333333333333], [3.0, -1.5])
    """
    low = torch.stack([seen.low for seen in read]).amin(0).double()
    high = torch.stack([seen.high for seen in read]).amax(0).double()
    alive = high - low > 1e-9 * (high - low).max()
    if not bool(alive.any()):
        return Reparameterization(torch.ones_like(low), low)
    scale = torch.where(alive, (high - low) / (2**bits - 1), torch.ones_like(low))
    zero = -low / scale
    mean, zero_point = scale[alive].mean(), zero[alive].mean().round()
    ratio = torch.where(alive, scale / mean, torch.ones_like(low))
    return Reparameterization(ratio, torch.where(alive, mean * (zero_point - zero), low))


def _fold(draft: Draft, link: Link, found: Reparameterization) -> None:
    """Fold it into the network of a draft, whose channels may be scaled on top of that."""
    norm = draft.session.modules[link.maker]
    known = draft.scaling.get(link.readers[0])
    scaled = torch.ones_like(found.ratio) if known is None or known.read is None else known.read
    for name in link.readers:
        reader, weight = draft.session.modules[name], draft.session.modules[name].get_parameter("weight")
        wide = multiplied(weight.detach().double(), found.ratio)
        if reader._parameters.get("bias") is None:
            draft.add_parameter(reader, "bias", weight.new_zeros(len(weight)), float_bias(name))
        bias = reader.get_parameter("bias").detach().double()
        draft.replace(reader, "bias", bias + wide @ (found.shift * scaled).to(wide))
        draft.replace(reader, "weight", wide)
    gain, bias = (norm.get_parameter(name).detach().double() for name in ("weight", "bias"))
    ratio = found.ratio.to(gain)
    draft.replace(norm, "weight", gain / ratio)
    draft.replace(norm, "bias", bias / ratio - (found.shift * scaled).to(bias))


def _left(reason: str) -> dict[str, Any]:
    return {"reason": reason}
