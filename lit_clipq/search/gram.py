"""Sums over what a layer with a weight saw, of which fits of weight and bias are made, in float64."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_clipq.calibration.observations import Observations
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.functional.distance import Distance
from lit_clipq.nn.layout import ROWS
from lit_clipq.nn.modules import QConv2d, QLinear, QWeighted
from lit_clipq.search.data import LayerData
from lit_clipq.search.losses import parts, target_of, workspace
from lit_clipq.search.sampling import patches_of


def has_rows(module: nn.Module) -> bool:
    """Whether the product of a layer is that of rows and a matrix: linear layers and convolutions."""
    return isinstance(module, QLinear | QConv2d)


def groups_of(module: QWeighted) -> int:
    """Return G, the number of groups of a convolution, 1 of others."""
    return module.groups if isinstance(module, QConv2d) else 1


def as_matrix(module: QWeighted, x: Tensor) -> Tensor:
    """Return something of the shape of a layer's weight as (G, R, d)."""
    return x.reshape(groups_of(module), -1, x[0].numel())


@dataclass(frozen=True)
class Rows:
    """Rows of a layer's product, convolutions unfolded; float32."""

    exact: Tensor
    """What comes in, (G, N, d)."""
    rounded: Tensor
    """The same, rounded."""
    target: Tensor
    """What should come out without the bias, (G, N, R)."""
    weight: Tensor | None
    """What an error of a row costs, (G, N); the mean over the channels of a group."""


def rows_of(module: QWeighted, data: LayerData, distance: Distance) -> Iterator[Rows]:
    """Yield the rows that a layer saw on this rank, as many at a time as the workspace takes.

    Args:
        module: For which `has_rows` holds; its input grid has its scale.
        data: What it saw.
        distance: With `hessian` the rows have weights.
    """
    quantizer, groups = module.operand_quantizers.get("input"), groups_of(module)
    bias = None if module.bias is None else module.bias.detach().float()
    for o in data.weighted(distance)[0]:
        channels = len(module.weight)
        elements = target_of(o)[:1].numel() // channels * (module.weight[0].numel() + channels)
        for _, units in parts(o, elements, workspace(data.device)) if len(o.keys) else ():
            x = units.inputs[0]
            rounded = x if quantizer is None else quantizer(x)
            target = _by_group(target_of(units), units, groups)
            yield Rows(
                _unfolded(x, module, units, groups),
                _unfolded(rounded, module, units, groups),
                target if bias is None else target - bias.view(groups, 1, -1),
                None if units.weight is None else _by_group(units.weight, units, groups).mean(-1),
            )


def _unfolded(x: Tensor, module: QWeighted, o: Observations, groups: int) -> Tensor:
    """Return inputs as rows (G, N, d)."""
    if o.layout is ROWS:
        return x[None]
    patches = patches_of(x, module)  # (B, C kh kw, P)
    return patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _by_group(y: Tensor, o: Observations, groups: int) -> Tensor:
    """Return products as rows (G, N, R)."""
    rows = y.movedim(o.layout.channel_axis, -1).reshape(-1, y.shape[o.layout.channel_axis])
    return rows.unflatten(1, (groups, -1)).movedim(1, 0)


@dataclass(frozen=True)
class Gram:
    """Sums over the rows of all ranks, float64; each row with its weight."""

    hessian: Tensor
    """`X^^T X^` of the rounded inputs, (G, d, d); with a column of ones behind them if asked for."""
    deviation: Tensor | None = None
    """`(X - X^)^T X^`, (G, d, d)."""
    residual: Tensor | None = None
    """`(T - X^ W^T)^T X^`, (G, R, d), T the target without bias, W the float weight that the layer holds."""


def gram_of(
    module: QWeighted,
    data: LayerData,
    distance: Distance,
    *,
    deviation: bool = False,
    residual: bool = False,
    ones: bool = False,
) -> Gram:
    """Add up what fits of a weight need; a collective call.

    Args:
        module: As for `rows_of`.
        data: What it saw.
        distance: `hessian` weighs rows, which makes X^T diag(g) X of X^T X: the Gauss-Newton matrix of each output
            channel, but for a factor, where squared gradients are those of rows times those of channels.
        deviation: Whether it is wanted.
        residual: Whether it is wanted.
        ones: Whether the inputs have a column of ones behind them, for the bias.
    """
    weight = as_matrix(module, module.weight.detach().double())
    groups, channels, width = weight.shape
    width += ones

    def zeros(rows: int) -> Tensor:
        return torch.zeros(groups, rows, width, dtype=torch.float64, device=data.device)

    h, d, r = zeros(width), zeros(width) if deviation else None, zeros(channels) if residual else None
    for rows in rows_of(module, data, distance):
        plain = rows.rounded.double()
        x = torch.cat([plain, torch.ones_like(plain[..., :1])], dim=-1) if ones else plain
        weighted = x if rows.weight is None else x * rows.weight[..., None]
        h += x.mT @ weighted
        if d is not None:
            change = rows.exact.double() - plain
            d += (torch.cat([change, torch.zeros_like(change[..., :1])], dim=-1) if ones else change).mT @ weighted
        if r is not None:
            r += (rows.target.double() - plain @ weight.mT).mT @ weighted
    return Gram(*(None if x is None else sum_over_ranks(x) for x in (h, d, r)))  # type: ignore[arg-type]
