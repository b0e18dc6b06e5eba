"""Equalise the channels that layers read, by powers of two that leave the float network the same to the bit.

Dividing channel j by r_j where it is made, and multiplying it by r_j in the weights that read it, leaves the function
as it is: `y = (x / r) (r W)^T`. It moves range from an activation, whose channels share one grid, into the weights, as
SmoothQuant does (arXiv 2211.10438). With powers of two nothing is rounded, so that running the network tells whether a
channel may be scaled: the outputs of calibration must stay the same to the bit.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_clipq.calibration.channels import Channels, Link
from lit_clipq.calibration.needs import Need, Write
from lit_clipq.calibration.scaling import ChannelScaling
from lit_clipq.distributed import gather
from lit_clipq.functional.granularity import PerChannel, extrema
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.nn.swap import FLOAT_BITS
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.grids import Grids
from lit_clipq.stages.proof import that_hold
from lit_clipq.stages.stage import FloatStage, Report, stage

log = logging.getLogger(__name__)

_SHARES = torch.linspace(0, 1, 9, dtype=torch.float64)
_ROWS = 256  # of a weight, at least, that stand for all
_LARGEST_EXPONENT = 12  # far from the ends of float32


@stage("equalize")
@dataclass(frozen=True)
class Equalize(FloatStage):
    """Equalise the channels behind the LayerNorms and within the attentions of every block.

    Of a channel with magnitude m_j over the calibration set and largest weight w_j, r_j is `m_j^a / w_j^(1 - a)` over
    its median, rounded to a power of two from 2^-12 to 2^12. Of nine a between 0 and 1, and of no scaling at all, the
    one with the least `expected_error` of the readers is taken. A LayerNorm whose reader is no member of the same list
    of modules is left alone: what stands between blocks or ends a tower is read by tasks, too. So are values that an
    attention hands on to a cache, and all values where the channels of a weight share a scale.

    Where the outputs change, something else reads the channels; halves are then tried by themselves, with a run of one
    batch each, until those that can stay are found.
    """

    needs = frozenset({Need.CHANNELS, Need.OUTPUTS})
    writes = frozenset({Write.NORMS, Write.WEIGHTS})
    in_place = False

    @torch.no_grad()
    def rewrite(self, draft: Draft) -> Report:
        """Scale channels of a draft.

        Returns:
            By the name of what makes the channels: expected error over that without scaling; or why none are scaled.
        """
        per_channel, seen = draft.stage(Grids).per_channel, draft.channels
        widths = {entry.name: entry for entry in draft.plan.quantized}
        chosen: dict[Link, tuple[Tensor, float]] = {}
        for link in seen.links:
            readers = [(draft.parameters(name)[0], seen.channels[name]) for name in link.readers]
            offers = _offers(*readers)
            errors = torch.zeros(len(offers), dtype=torch.float64)
            for name, reader in zip(link.readers, readers, strict=True):
                if name in widths:
                    bits = widths[name].weight_bits or FLOAT_BITS, widths[name].activation_bits
                    errors += expected_error(*reader, *bits, offers, per_channel=per_channel)
            best = int(errors.argmin())
            if best:
                chosen[link] = offers[best], float(errors[best] / errors[0])
        chosen = gather(chosen)[0]  # the same on every rank, to the bit
        kept = that_hold(draft, [ChannelScaling(link, factors) for link, (factors, _) in chosen.items()])
        draft.scale(kept)
        if len(kept) < len(chosen):
            stay = {scaling.link for scaling in kept}
            left = [link.maker for link in chosen if link not in stay]
            log.warning(
                "the channels that %s makes stay as they are, as something else reads them (%d of %d)",
                left[0],
                len(left),
                len(chosen),
            )
        nothing = {"reason": "no channels are better scaled" if seen.links else "no layer reads channels of another"}
        return {scaling.link.maker: chosen[scaling.link][1] for scaling in kept} or nothing


def expected_error(
    weight: Tensor,
    seen: Channels,
    weight_bits: int,
    activation_bits: int,
    factors: Tensor,
    *,
    per_channel: bool = True,
) -> Tensor:
    """Predict the squared error of a layer's output from min-max grids, of rows on average.

    Errors of channels are taken as independent of each other. That of an input with step S is noise of variance
    `n(x) = min(E[x^2], S^2 / 12)`, as values far below the step become 0; that of a weight is computed:
    `sum_oj n(x_j / r_j) (r_j W_oj)^2 + (Q(r_j W_oj) - r_j W_oj)^2 E[x_j^2] / r_j^2`.

    Args:
        weight: Shape (out, channels).
        seen: What the layer reads.
        weight_bits: Width of the weight, with symmetric grids; 32 is float.
        activation_bits: Width of the input, with one affine grid; 32 is float.
        factors: Shape (K, channels), float64 on the CPU: by what channels are divided.
        per_channel: Whether each row of the weight has a grid of its own; else one serves all.

    Returns:
        Shape (K,), float64 on the CPU.

    Example:
        >>> factors = torch.tensor([[1.0, 1.0], [8.0, 1.0]], dtype=torch.float64)
        >>> seen = Channels.of(torch.tensor([[-8.0, 1.0], [8.0, -1.0]]))
        >>> before, after = expected_error(torch.tensor([[0.1, 0.8]]), seen, 8, 8, factors)
        >>> bool(after < before)
        True
    """
    rows = weight[:: max(1, len(weight) // _ROWS)]
    stand_for = len(weight) / len(rows)
    power = seen.squares / seen.rows / factors.square()
    error = torch.zeros(len(factors), dtype=torch.float64)
    if activation_bits != FLOAT_BITS:
        reach = (seen.high / factors).amax(1).clamp(min=0) - (seen.low / factors).amin(1).clamp(max=0)
        noise = torch.minimum(power, (reach / (2**activation_bits - 1)).square()[:, None] / 12)
        error += (noise * factors.square()) @ weight.square().sum(0, dtype=torch.float64).cpu()
    if weight_bits != FLOAT_BITS:
        grid = UniformQuantizer(weight_bits, symmetric=True, granularity=PerChannel(0))
        multiplied = rows * factors.to(rows)[:, None]  # (K, rows, channels)
        multiplied = multiplied.flatten(0, 1) if per_channel else multiplied.flatten(1)  # (grids, what they serve)
        grid.set_range(*extrema(multiplied, grid.granularity))
        squares = (grid(multiplied) - multiplied).square_().view(len(factors), *rows.shape).sum(1)
        error += stand_for * (squares.cpu() * power).sum(1)
    return error


def _offers(*readers: tuple[Tensor, Channels]) -> Tensor:
    """Return what channels could be divided by, (K, channels): nothing first, then a share of their differences."""
    magnitude = torch.stack([torch.maximum(-seen.low, seen.high) for _, seen in readers]).amax(0)
    largest = torch.stack([weight.abs().amax(0).double().cpu() for weight, _ in readers]).amax(0)
    alive = (magnitude > 0) & (largest > 0)
    exponents = torch.zeros(1 + len(_SHARES), len(magnitude), dtype=torch.float64)
    if alive.any():
        magnitude, largest = magnitude[alive].log2(), largest[alive].log2()
        shares = _SHARES[:, None]
        found = shares * magnitude - (1 - shares) * largest
        found = found - found.median(dim=1, keepdim=True).values
        exponents[1:, alive] = found.round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.exp2(exponents)
