"""Which float layers can be quantized, and by what. Adding a kind is one entry here."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lit_clipq.nn.embedding import QEmbedding
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.modules import QConv2d, QLinear, QMatMul, QModule


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


def _linear_macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:  # noqa: ARG001
    return inputs[0].numel() * output.shape[-1]


def _conv_macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:  # noqa: ARG001
    weight = layer.get_parameter("weight")
    return output.numel() * weight[0].numel()


def _no_macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:  # noqa: ARG001
    return 0


def _matmul_macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:  # noqa: ARG001
    return output.numel() * inputs[0].shape[-1]


KINDS: tuple[LayerKind, ...] = (
    LayerKind("linear", nn.Linear, QLinear, has_weight=True, operands=1, macs=_linear_macs),
    LayerKind("conv2d", nn.Conv2d, QConv2d, has_weight=True, operands=1, macs=_conv_macs),
    LayerKind("matmul", MatMul, QMatMul, has_weight=False, operands=2, macs=_matmul_macs),
    LayerKind("embedding", nn.Embedding, QEmbedding, has_weight=True, operands=0, macs=_no_macs),
)


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


_COMPUTES = ("forward", "_conv_forward")
