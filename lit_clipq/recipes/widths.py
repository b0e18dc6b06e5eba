"""Widths of weights and activations, for each tower, and how the command line's flags decide them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lit_clipq.errors import ConfigError
from lit_clipq.nn.swap import Layer, check_pattern
from lit_clipq.nn.widths import FLOAT_BITS, check_bits, read_widths

TOWERS = ("vision", "text")
OPERANDS = ("weight", "activation")


@dataclass(frozen=True)
class LayerWidths:
    """Widths of the layers whose names match a shell pattern; `None` leaves what another rule says."""

    pattern: str
    """Shell pattern of whole layer names, such as `clip.visual.*.mlp.*`."""
    weight: int | None = None
    """Width of weights."""
    activation: int | None = None
    """Width of activations."""

    def __post_init__(self) -> None:
        for name, bits in (("weight", self.weight), ("activation", self.activation)):
            if bits is not None:
                check_bits(f"the {name} width of {self.pattern!r}", bits)

    @classmethod
    def of(cls, pattern: str, widths: int | str) -> "LayerWidths":
        """Read widths: a number for both, `float`, or letters and numbers such as `w4a8`, `w4`, `a8`.

        Raises:
            ConfigError: If it is none of these.

        Example:
            >>> LayerWidths.of("clip.visual.*", "w4a8")
            LayerWidths(pattern='clip.visual.*', weight=4, activation=8)
        """
        weight, activation = read_widths(f"the widths of {pattern!r}", widths)
        return cls(pattern, weight, activation)


@dataclass(frozen=True)
class BitWidths:
    """Widths in bits, 2 to 16, or 32 for float.

    Example:
        >>> BitWidths.resolve({"bits": 8, "text_bits": 6, "text_activation_bits": 16}).in_words()
        'vision W8A8, text W6A16'
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
    layers: tuple[LayerWidths, ...] = ()
    """Widths by pattern of layer names, on top of those of the towers; of several that match the last one wins."""

    def __post_init__(self) -> None:
        for name, bits in self.by_tower().items():
            check_bits(name, bits)

    @property
    def rules(self) -> tuple[LayerWidths, ...]:
        """All widths as patterns of layer names, those of the towers first; the last one that matches wins."""
        return (
            LayerWidths("*", self.other_weight, self.other_activation),
            LayerWidths("clip.*", self.text_weight, self.text_activation),
            *(LayerWidths(name, self.vision_weight, self.vision_activation) for name in ("clip.visual.*", "vision.*")),
            *self.layers,
        )

    def of(self, name: str) -> tuple[int, int]:
        """Return (weight bits, activation bits) of a layer by its name.

        Example:
            >>> widths = BitWidths.resolve({"bits": 8}, {"clip.visual.*.mlp.*": "w4", "*.c_proj": "a16"})
            >>> widths.of("clip.visual.transformer.resblocks.0.mlp.c_proj"), widths.of("clip.visual.conv1")
            ((4, 16), (8, 8))
        """
        weight = activation = 8
        for rule in self.rules:
            if fnmatchcase(name, rule.pattern):
                weight = weight if rule.weight is None else rule.weight
                activation = activation if rule.activation is None else rule.activation
        return weight, activation

    def why_float(self, name: str, tower: str) -> str:
        """Say what sets a layer to 32 bits."""
        pattern = next((rule.pattern for rule in reversed(self.layers) if fnmatchcase(name, rule.pattern)), None)
        return f"{tower if pattern is None else repr(pattern)} is set to {FLOAT_BITS} bits"

    def check_patterns(self, layers: Sequence[Layer]) -> None:
        """Refuse patterns that match no layer.

        Raises:
            ConfigError: Names the pattern and some layers.
        """
        for rule in self.layers:
            check_pattern("widths", rule.pattern, layers)

    def all_float(self, towers: Iterable[str] = (*TOWERS, "other")) -> bool:
        """Whether nothing in the given towers is to be quantized; an unknown one counts as `other`."""
        prefixes = {tower if tower in TOWERS else "other" for tower in towers}
        by_tower = (getattr(self, f"{prefix}_{operand}") for prefix in prefixes for operand in OPERANDS)
        by_pattern = (bits for rule in self.layers for bits in (rule.weight, rule.activation) if bits is not None)
        return all(bits == FLOAT_BITS for bits in (*by_tower, *by_pattern))

    def by_tower(self) -> dict[str, int]:
        """Return the widths of the towers by name, `vision_weight` and so on; patterns are not among them."""
        return {name: getattr(self, name) for name in (f"{t}_{o}" for t in (*TOWERS, "other") for o in OPERANDS)}

    def in_words(self) -> str:
        """Name the widths for a table: `W8A8`, or tower by tower where they differ, and how many patterns there are."""
        of = {tower: f"W{getattr(self, f'{tower}_weight')}A{getattr(self, f'{tower}_activation')}" for tower in TOWERS}
        same = len(set(of.values())) == 1
        told = of["vision"] if same else ", ".join(f"{tower} {width}" for tower, width in of.items())
        patterns = f" + {len(self.layers)} pattern{'s' * (len(self.layers) != 1)}" if self.layers else ""
        return told + patterns

    @classmethod
    def resolve(cls, flags: Mapping[str, int | None], patterns: Mapping[str, int | str] | None = None) -> "BitWidths":
        """Decide each width by the most specific flag that speaks of it.

        `{vision,text}_{weight,activation}_bits` beats `{vision,text}_bits` and `{weight,activation}_bits`, which beat
        `bits` (default 8).

        Args:
            flags: Flag name to width; `None` counts as not given.
            patterns: Shell pattern of layer names to widths; see `LayerWidths.of`.

        Raises:
            ConfigError: For a width outside 2..16 that is not 32, or two flags of equal rank that disagree.
        """
        given = {name: bits for name, bits in flags.items() if bits is not None}
        for name, bits in given.items():
            check_bits(name, bits)
        widths = {f"{t}_{o}": _decide(given, t, o) for t in TOWERS for o in OPERANDS}
        widths |= {f"other_{o}": given.get(f"{o}_bits", given.get("bits", 8)) for o in OPERANDS}
        layers = tuple(LayerWidths.of(pattern, value) for pattern, value in (patterns or {}).items())
        return cls(**widths, layers=layers)


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
