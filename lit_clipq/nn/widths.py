"""Widths of operands in bits: which there are, and how they are written."""

import re

from lit_clipq.errors import ConfigError
from lit_clipq.functional.uniform import MAX_BITS, MIN_BITS

FLOAT_BITS = 32

Widths = tuple[int | None, int | None]
"""Width of the weight and of the activations; `None` leaves what another rule says."""


def check_bits(name: str, bits: int) -> None:
    """Refuse a width that no grid has.

    Raises:
        ConfigError: If `bits` is neither 2 to 16 nor 32.
    """
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise ConfigError(f"{name} must be a whole number of bits, got {bits!r}")
    if bits != FLOAT_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"{name} must be {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for float; got {bits}")


def read_widths(what: str, widths: int | str) -> Widths:
    """Read widths: a number for both, `float`, or letters and numbers such as `w4a8`, `w4`, `a8`.

    Args:
        what: How errors call them.
        widths: As a person writes them.

    Raises:
        ConfigError: If it is none of these, or a width that no grid has.

    Example:
        >>> read_widths("here", "w4a8"), read_widths("here", 6), read_widths("here", "w3")
        ((4, 8), (6, 6), (3, None))
    """
    if widths == "float":
        return FLOAT_BITS, FLOAT_BITS
    if isinstance(widths, int) and not isinstance(widths, bool):
        found: Widths = (widths, widths)
    else:
        match = re.fullmatch(r"(?:w(\d{1,2}))?(?:a(\d{1,2}))?", str(widths).lower())
        if not widths or match is None:
            raise ConfigError(f"{what} must be a number, `float`, or such as `w4a8`, `w4` or `a8`; got {widths!r}")
        weight, activation = (None if bits is None else int(bits) for bits in match.groups())
        found = weight, activation
    for name, bits in zip(("weight", "activation"), found, strict=True):
        if bits is not None:
            check_bits(f"the {name} width of {what.removeprefix('the widths of ')}", bits)
    return found


def written(weight: int | None, activation: int | None) -> str:
    """Write widths as `read_widths` reads them; 32 is float.

    Example:
        >>> written(4, 8), written(None, 6)
        ('w4a8', 'a6')
    """
    return ("" if weight is None else f"w{weight}") + ("" if activation is None else f"a{activation}")
