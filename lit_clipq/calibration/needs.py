"""What a stage may ask of a calibration session."""

from enum import Enum, auto


class Need(Enum):
    """Something that the network shows on the calibration set."""

    SOURCES = auto()
    """What stands in front of each layer: an activation's minimum, a softmax."""
    CHANNELS = auto()
    """Range and power of every channel that linear layers read, and who makes the channels."""
    LINKS = auto()
    """The same along links of every kind, with a sample of the rows and maps that their readers read."""
    OUTPUTS = auto()
    """The outputs that matter, of one batch of each kind, to compare with after a change."""
    START = auto()
    """What the attention products of causal text towers see of the first position."""
    RANGES = auto()
    """Minimum and maximum of every operand."""
    OPERANDS = auto()
    """The operands themselves, layer by layer within the memory limit."""
    GRADIENTS = auto()
    """Squared gradients of the objective by each layer's output, beside the operands."""

    @property
    def whole_set(self) -> bool:
        """Whether every batch has a say; else one of each kind will do."""
        return self not in (Need.SOURCES, Need.OUTPUTS, Need.START)

    @property
    def by_layer(self) -> bool:
        """Whether it is kept only while its layer is visited."""
        return self in (Need.OPERANDS, Need.GRADIENTS)


class Write(Enum):
    """Something that a stage changes."""

    NORMS = auto()
    """Gains and biases of normalisations."""
    WEIGHTS = auto()
    """Weights of layers."""
    BIAS = auto()
    """Biases of layers."""
    GRIDS = auto()
    """Which layers are quantized, and the kind of each operand's grid."""
    SCALES = auto()
    """The parameters of grids."""
    STRUCTURE = auto()
    """Which modules the network has."""


SPOILS: dict[Write, frozenset[Need]] = {
    Write.NORMS: frozenset({Need.CHANNELS, Need.LINKS, Need.OUTPUTS, Need.START, Need.RANGES}),
    Write.WEIGHTS: frozenset({Need.CHANNELS, Need.LINKS, Need.OUTPUTS, Need.START, Need.RANGES}),
    Write.BIAS: frozenset({Need.CHANNELS, Need.LINKS, Need.OUTPUTS, Need.START, Need.RANGES}),
    Write.STRUCTURE: frozenset(need for need in Need if not need.by_layer),
    Write.GRIDS: frozenset(),
    Write.SCALES: frozenset(),
}
"""Which needs a write ends the validity of; what is collected layer by layer is never older than its visit."""
