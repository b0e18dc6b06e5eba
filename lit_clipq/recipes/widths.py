"""Widths of weights and activations, for each tower, and how the command line's flags decide them."""

from collections.abc import Mapping
from dataclasses import dataclass

from lit_clipq.errors import ConfigError
from lit_clipq.functional.uniform import MAX_BITS, MIN_BITS
from lit_clipq.nn.swap import FLOAT_BITS

TOWERS = ("vision", "text")
OPERANDS = ("weight", "activation")


@dataclass(frozen=True)
class BitWidths:
    """Widths in bits, 2 to 16, or 32 for float.

    Example:
        >>> BitWidths.resolve({"bits": 8, "text_bits": 6, "text_activation_bits": 16})
        BitWidths(vision_weight=8, vision_activation=8, text_weight=6, text_activation=16, other_weight=8, \
other_activation=8)
    """

    vision_weight: int = 8
    """Weights of the image tower."""
    vision_activation: int = 8
    """Activations of the image tower."""
    text_weight: int = 8
    """Weights of the text tower."""
    text_activation: int = 8
    """Activations of the text tower."""
    other_weight: int = 8
    """Weights of whatever else is quantized (a head, a language model)."""
    other_activation: int = 8
    """Activations of whatever else is quantized."""

    def __post_init__(self) -> None:
        for name, bits in vars(self).items():
            check_bits(name, bits)

    def of(self, tower: str) -> tuple[int, int]:
        """Return (weight bits, activation bits) of a tower; an unknown one counts as `other`."""
        prefix = tower if tower in TOWERS else "other"
        return getattr(self, f"{prefix}_weight"), getattr(self, f"{prefix}_activation")

    @property
    def all_float(self) -> bool:
        """Whether nothing is to be quantized."""
        return all(bits == FLOAT_BITS for bits in vars(self).values())

    @classmethod
    def resolve(cls, flags: Mapping[str, int | None]) -> "BitWidths":
        """Decide each width by the most specific flag that speaks of it.

        `{vision,text}_{weight,activation}_bits` beats `{vision,text}_bits` and `{weight,activation}_bits`, which beat
        `bits` (default 8).

        Args:
            flags: Flag name to width; `None` counts as not given.

        Raises:
            ConfigError: For a width outside 2..16 that is not 32, or two flags of equal rank that disagree.
        """
        given = {name: bits for name, bits in flags.items() if bits is not None}
        for name, bits in given.items():
            check_bits(name, bits)
        widths = {f"{t}_{o}": _decide(given, t, o) for t in TOWERS for o in OPERANDS}
        widths |= {f"other_{o}": given.get(f"{o}_bits", given.get("bits", 8)) for o in OPERANDS}
        return cls(**widths)


def _decide(given: Mapping[str, int], tower: str, operand: str) -> int:
    exact = f"{tower}_{operand}_bits"
    if exact in given:
        return given[exact]
    by_tower, by_operand = given.get(f"{tower}_bits"), given.get(f"{operand}_bits")
    if by_tower is not None and by_operand is not None and by_tower != by_operand:
        raise ConfigError(
            f"{tower}_bits={by_tower} and {operand}_bits={by_operand} disagree about the {operand}s of the {tower} "
            f"tower and rank the same; decide with {exact}"
        )
    for bits in (by_tower, by_operand, given.get("bits")):
        if bits is not None:
            return bits
    return 8


def check_bits(name: str, bits: int) -> None:
    """Refuse a width that no grid has.

    Raises:
        ConfigError: If `bits` is neither 2 to 16 nor 32.
    """
    if bits != FLOAT_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"{name} must be {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for float; got {bits}")
