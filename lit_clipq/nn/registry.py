"""Which float layers can be quantized, and by what. Adding a kind is one entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from lit_clipq.errors import ConfigError
from lit_clipq.nn.embedding import QEmbedding
from lit_clipq.nn.layout import MAPS, PAIRS, PATCHES, ROWS, Layout, PairLayout
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.modules import QConv2d, QLinear, QMatMul, QModule
from lit_clipq.nn.prefix import Prefixed


@dataclass(frozen=True)
class LayerKind:
    """A family of quantizable layers."""

    name: str
    """What maps and reports call it."""
    float_type: type[nn.Module]
    """The float layer, subclasses included."""
    quantized_type: Callable[..., QModule]
    """Called as `quantized_type(original, *quantizers)`."""
    has_weight: bool
    """Whether the first quantizer is the weight's; the others belong to the operands in order."""
    operands: int
    """How many inputs can have a quantizer; 0 for a table, which is no product."""
    macs: Callable[[nn.Module, tuple[Tensor, ...], Tensor], int]
    """Multiply-accumulates of one call, from (layer, inputs, output)."""
    layout: Callable[[nn.Module], Layout]
    """How tensors of a layer (float or quantized) are cut into units."""

    @property
    def is_table(self) -> bool:
        """Whether layers of this kind multiply nothing: what they see does not matter for their grids."""
        return not self.operands

    @property
    def is_product_of_activations(self) -> bool:
        """Whether both operands are computed at run time."""
        return not self.has_weight


def _linear_macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:  # noqa: ARG001
    return inputs[0].numel() * output.shape[-1]


def _conv_macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:  # noqa: ARG001
    weight = layer.get_parameter("weight")
    return output.numel() * weight[0].numel()


def _no_macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:  # noqa: ARG001
    return 0


def _matmul_macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:  # noqa: ARG001
    return output.numel() * inputs[0].shape[-1]


def _rows(layer: nn.Module) -> Layout:  # noqa: ARG001
    return ROWS


def _maps(layer: nn.Module) -> Layout:
    return PATCHES if layer.groups == 1 else MAPS


def _pairs(layer: nn.Module) -> Layout:
    product = cast(Prefixed, layer)
    if product.prefix_size == 0:
        return PAIRS
    return PairLayout(product.prefix_size, scores=product.prefix_keys is not None)


KINDS: list[LayerKind] = [
    LayerKind("linear", nn.Linear, QLinear, has_weight=True, operands=1, macs=_linear_macs, layout=_rows),
    LayerKind("conv2d", nn.Conv2d, QConv2d, has_weight=True, operands=1, macs=_conv_macs, layout=_maps),
    LayerKind("matmul", MatMul, QMatMul, has_weight=False, operands=2, macs=_matmul_macs, layout=_pairs),
    LayerKind("embedding", nn.Embedding, QEmbedding, has_weight=True, operands=0, macs=_no_macs, layout=_rows),
]


_COMPUTES = ("forward", "_conv_forward")


def register_kind(kind: LayerKind) -> None:
    """Make a further kind of layer quantizable, for this process; a kind of this package is an entry in `KINDS`.

    Args:
        kind: The kind. Layers that an earlier one takes stay with it.

    Raises:
        ConfigError: If its name is taken, or all of its layers are taken by an earlier kind.
    """
    for known in KINDS:
        if known.name == kind.name or issubclass(kind.float_type, known.float_type):
            raise ConfigError(
                f"layer kind {kind.name!r} for {kind.float_type.__name__} meets the kind {known.name!r} for "
                f"{known.float_type.__name__}; give it another name, or a layer that no kind has"
            )
    KINDS.append(kind)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind that quantizes `module`, or `None`.

    A subclass with a `forward` of its own has none: its quantized stand-in would compute what its base class does.
    """
    kind = next((kind for kind in KINDS if isinstance(module, kind.float_type)), None)
    if kind is None or any(
        getattr(type(module), name, None) is not getattr(kind.float_type, name, None) for name in _COMPUTES
    ):
        return None
    return kind


def layout_of(module: nn.Module) -> Layout:
    """Return how the tensors of a layer are laid out, float or quantized.

    Raises:
        TypeError: For a module of no kind.
    """
    for kind in KINDS:
        if isinstance(module, (kind.float_type, cast(type, kind.quantized_type))):
            return kind.layout(module)
    raise TypeError(f"expected a layer of a kind in lit_clipq.nn.registry, got {type(module).__name__}; add an entry")
