"""What shares one scale.

| granularity        | input shape | scale shape                   | scale of element         |
|--------------------|-------------|-------------------------------|--------------------------|
| `PerTensor()`      | (*)         | ()                            | the one                  |
| `PerChannel(axis)` | (*)         | (x.shape[axis],)              | its index along `axis`   |
| `PerToken()`       | (*, C)      | (*, 1), fresh for every input | its row                  |
| `PerToken(-2)`     | (*, C, N)   | (*, 1, N), fresh likewise     | its column               |
| `PerSample()`      | (B, *)      | (B, 1, ...), fresh likewise   | its sample               |
| `PerGroup(size)`   | (*, C)      | (*, C / size, 1)              | its `size` neighbours    |
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along an axis."""

    axis: int = 0
    """Axis that is kept; negative values count from the end."""


@dataclass(frozen=True)
class PerToken:
    """One scale for each token, computed from the input itself at run time: what else is in a batch does not matter."""

    axis: int = -1
    """Axis of a token's features, which is reduced; -1, or -2 for tokens that are columns."""


@dataclass(frozen=True)
class PerSample:
    """One scale for each index along the first axis, computed from the input itself at run time."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` neighbours along the last axis."""

    size: int = 128
    """Elements that share a scale; must divide the last axis."""


Granularity = PerTensor | PerChannel | PerToken | PerSample | PerGroup
_NAMES = {
    "per_tensor": PerTensor,
    "per_channel": PerChannel,
    "per_token": PerToken,
    "per_sample": PerSample,
    "per_group": PerGroup,
}


def at_run_time(granularity: Granularity) -> bool:
    """Whether scales are computed from each input, so that there is nothing to calibrate."""
    return isinstance(granularity, PerToken | PerSample)


def named_granularity(granularity: Granularity) -> list[Any]:
    """Return a granularity as plain values: its name, then its argument if it has one.

    Example:
        >>> named_granularity(PerGroup(64))
        ['per_group', 64]
    """
    name = next(name for name, kind in _NAMES.items() if type(granularity) is kind)
    return [name, *vars(granularity).values()]


def granularity_of(named: Sequence[Any]) -> Granularity:
    """Undo `named_granularity`.

    Raises:
        ValueError: For another name, or an argument that is no whole number.
    """
    name, *arguments = named or [""]
    kind = _NAMES.get(name) if isinstance(name, str) else None
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in arguments)
    if kind is None or len(arguments) > len(fields(kind)) or not whole:
        raise ValueError(
            f"expected the name of a granularity ({', '.join(_NAMES)}) and its argument, got {list(named)}"
        )
    return kind(*arguments)  # type: ignore[no-any-return]


def split_groups(x: Tensor, size: int) -> Tensor:
    """Reshape (*, C) to (*, C / size, size).

    Raises:
        ValueError: If `size` does not divide the last axis.
    """
    if x.shape[-1] % size:
        raise ValueError(f"group size {size} does not divide the last axis of {tuple(x.shape)}; choose a divisor")
    return x.unflatten(-1, (x.shape[-1] // size, size))


def extrema(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Return (minimum, maximum) of `x`, each of the scale shape that `granularity` names.

    NaN propagates into both.

    Example:
        >>> import torch
        >>> low, high = extrema(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), PerChannel(0))
        >>> low.tolist(), high.tolist()
        ([-2.0, 3.0], [1.0, 4.0])
    """
    if isinstance(granularity, PerTensor):
        return x.aminmax()
    if isinstance(granularity, PerChannel):
        return x.movedim(granularity.axis, 0).flatten(1).aminmax(dim=1) if x.dim() > 1 else (x, x)
    if isinstance(granularity, PerSample):
        low, high = x.flatten(1).aminmax(dim=1)
        shape = (-1, *[1] * (x.dim() - 1))
        return low.view(shape), high.view(shape)
    if isinstance(granularity, PerToken):
        return x.aminmax(dim=granularity.axis, keepdim=True)
    return split_groups(x, granularity.size).aminmax(dim=-1, keepdim=True)
