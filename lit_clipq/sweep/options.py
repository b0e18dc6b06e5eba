"""Which points a sweep has: options, and the grid that they span."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from lit_clipq.errors import ConfigError

AXES = (
    "bits",
    "vision_bits",
    "text_bits",
    "weight_bits",
    "activation_bits",
    "vision_weight_bits",
    "vision_activation_bits",
    "text_weight_bits",
    "text_activation_bits",
)
"""Options whose values are the widths of a grid, in the order in which it is walked: the last one changes first."""


@dataclass(frozen=True)
class SweepOptions:
    """A grid: every method, with every seed, at every combination of the widths that are listed.

    What is not listed is what the group `quantize` says. A width is a number, 2 to 16 or 32 for float; `bits`,
    `vision_bits` and `text_bits` also take such as `w4a8`.
    """

    recipes: list[str] | None = None
    """Names of recipes; by default the one of `quantize`."""
    stages: dict[str, list[str | dict[str, Any]]] | None = None
    """Further methods, by a name of one's own: each a list of stages as for `quantize.stages`."""
    seeds: list[int] | None = None
    """Seeds of the choice of calibration samples; by default the one of `quantize`."""
    bits: list[int | str] | None = None
    """Widths of every weight and activation."""
    vision_bits: list[int | str] | None = None
    """Widths in the image tower."""
    text_bits: list[int | str] | None = None
    """Widths in the text tower."""
    weight_bits: list[int] | None = None
    """Widths of weights."""
    activation_bits: list[int] | None = None
    """Widths of activations."""
    vision_weight_bits: list[int] | None = None
    """Widths of weights in the image tower."""
    vision_activation_bits: list[int] | None = None
    """Widths of activations in the image tower."""
    text_weight_bits: list[int] | None = None
    """Widths of weights in the text tower."""
    text_activation_bits: list[int] | None = None
    """Widths of activations in the text tower."""
    engine: Literal["local", "ray"] = "local"
    """Where points are measured: in this process, or by Ray on GPUs and machines."""
    address: str | None = None
    """Ray cluster to join, such as `auto`; by default one of this machine is started."""
    workers: int | None = None
    """Ray workers at a time; by default one for each GPU, or for every two CPU cores where there is none."""
    retries: int = 3
    """How often the points of a lost Ray worker are tried again."""
    shard: str | None = None
    """Take the i-th of n parts of the grid only, given as `i/n`, into a results file of its own."""
    mix: bool = False
    """Add points to a results file that holds points of other code, model, data or settings."""

    def __post_init__(self) -> None:
        for name in ("recipes", "stages", "seeds", *AXES):
            values = getattr(self, name)
            if values is not None and not values:
                raise ConfigError(f"sweep.{name} is empty, so the grid has no point; list a value or leave it out")
            if values is not None and len({str(value) for value in values}) < len(values):
                raise ConfigError(f"sweep.{name} lists a value twice, got {list(values)}; list each once")
        for name, least in (("workers", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"sweep.{name} must be at least {least}, got {value}")
        both = sorted(set(self.recipes or ()) & set(self.stages or {}))
        if both:
            raise ConfigError(f"sweep.stages calls a method {both[0]!r} as sweep.recipes does; give it another name")
        self.part()

    def part(self) -> tuple[int, int] | None:
        """Return (i, n) of `shard`, with i from 1 to n.

        Raises:
            ConfigError: If it is not of that form.
        """
        if self.shard is None:
            return None
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        number, of = (int(text) for text in found.groups()) if found else (0, 0)
        if not 1 <= number <= of:
            raise ConfigError(f"sweep.shard must be i/n with i from 1 to n, such as 1/4, got {self.shard!r}")
        return number, of


@dataclass(frozen=True)
class GridPoint:
    """One point: what differs from the options of `quantize`."""

    method: str | None
    """Name of the method; `None` is the one of `quantize`."""
    seed: int | None
    """Seed of the calibration; `None` is the one of `quantize`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `quantize` by name: recipe or stages, seed, widths."""

    @property
    def group(self) -> tuple[str | None, int | None]:
        """What points share that are calibrated together."""
        return self.method, self.seed


def grid_of(options: SweepOptions) -> list[GridPoint]:
    """List the points of a grid: methods, then seeds, then widths in the order of `AXES`.

    Raises:
        ConfigError: For a width that has another form than a number or `w4a8`.

    Example:
        >>> points = grid_of(SweepOptions(recipes=["vanilla"], vision_bits=[8, "w4a8"], text_bits=[32]))
        >>> [dict(point.options) for point in points][1]
        {'recipe': 'vanilla', 'stages': None, 'vision_weight_bits': 4, 'vision_activation_bits': 8, 'text_bits': 32}
    """
    methods: list[tuple[str | None, dict[str, Any]]] = [
        (name, {"recipe": name, "stages": None}) for name in options.recipes or ()
    ]
    methods += [(name, {"stages": stages, "recipe": None}) for name, stages in (options.stages or {}).items()]
    axes = [
        [_flags(axis, value) for value in getattr(options, axis)] for axis in AXES if getattr(options, axis) is not None
    ]
    return [
        GridPoint(name, seed, method | ({} if seed is None else {"seed": seed}) | _merged(widths))
        for name, method in methods or [(None, {})]
        for seed in options.seeds or (None,)
        for widths in product(*axes)
    ]


def shard_of(points: Sequence[GridPoint], number: int, of: int) -> list[GridPoint]:
    """Return the `number`-th of `of` parts of a grid, cut where its outer axes change least: parts share least work."""
    return list(points[(number - 1) * len(points) // of : number * len(points) // of])


def _merged(flags: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: bits for each in flags for name, bits in each.items()}


def _flags(axis: str, value: int | str) -> dict[str, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return {axis: value}
    both = axis in ("bits", "vision_bits", "text_bits")
    found = re.fullmatch(r"w(\d{1,2})a(\d{1,2})", str(value).lower()) if both else None
    if found is None:
        raise ConfigError(f"sweep.{axis} must list numbers of bits{' or such as w4a8' * both}, got {value!r}")
    prefix = axis.removesuffix("bits")
    return {
        f"{prefix}{kind}_bits": int(bits) for kind, bits in zip(("weight", "activation"), found.groups(), strict=True)
    }
