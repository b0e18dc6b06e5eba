"""Layers whose operands are quantized: linear, convolution, matrix product.

Each stands in for its float original and starts in `Phase.FLOAT`, where it computes the same bits. `freeze` turns the
weight into integer codes; `Phase.QUANTIZED` rounds every operand that has a quantizer.
"""

from abc import abstractmethod
from enum import Enum, auto
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.prefix import Prefixed
from lit_clipq.nn.quantizer import Quantizer, UniformQuantizer
from lit_clipq.nn.state import LateBuffers


class Phase(Enum):
    """What a layer's forward computes."""

    FLOAT = auto()
    QUANTIZED = auto()


class QModule(LateBuffers):
    """A matrix product with one quantizer for each of its inputs.

    Attributes:
        input_quantizers: One entry an operand of `forward`; an absent quantizer leaves that operand float.
        phase: Whether `forward` quantizes.
        rivals: Grids that a search may put in the place of an operand's own.
        classes: Every Q-module class by its `id`.
        id: What saved models call the class; by default its name.
    """

    classes: ClassVar[dict[str, type["QModule"]]] = {}
    id: ClassVar[str]
    operands: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        """Make the class known by its id."""
        cls.id = cls.__dict__.get("id", cls.__name__)
        QModule.classes[cls.id] = cls

    def __init__(self, input_quantizers: tuple[Quantizer | None, ...]) -> None:
        super().__init__()
        if len(input_quantizers) != len(self.operands):
            raise ValueError(f"expected a quantizer or None for each of {self.operands}, got {len(input_quantizers)}")
        self.input_quantizers = nn.ModuleDict(
            {name: q for name, q in zip(self.operands, input_quantizers, strict=True) if q is not None}
        )
        self.phase = Phase.FLOAT
        self.rivals: dict[str, Quantizer] = {}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute the product of the inputs, rounded first in `Phase.QUANTIZED`."""
        if self.phase is Phase.FLOAT:
            return self.product(*inputs)
        quantizers = self.input_quantizers
        rounded = (
            quantizers[name](x) if name in quantizers else x for name, x in zip(self.operands, inputs, strict=True)
        )
        return self.product(*rounded)

    @property
    def operand_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the operands that have one."""
        return {name: cast(Quantizer, quantizer) for name, quantizer in self.input_quantizers.items()}

    @property
    def quantizers(self) -> tuple[Quantizer | None, ...]:
        """The quantizers in the order in which the class takes them."""
        return tuple(self.operand_quantizers.get(name) for name in self.operands)

    def config(self) -> dict[str, Any]:
        """Return class and quantizers as plain values; `from_config` of them swaps an equal, empty layer in."""
        return {"type": self.id, "quantizers": [q and q.config() for q in self.quantizers]}

    @staticmethod
    def from_config(config: dict[str, Any], original: nn.Module) -> "QModule":
        """Build the layer that `config` describes around a float layer; its grids have no parameters yet."""
        build = cast(Any, QModule.classes[config["type"]])
        return build(original, *(q and Quantizer.from_config(q) for q in config["quantizers"]))  # type: ignore[no-any-return]

    @abstractmethod
    def product(self, *inputs: Tensor) -> Tensor:
        """Compute the float product with the weight the layer holds now."""

    @property
    def is_frozen(self) -> bool:
        """Whether calibration is over."""
        return self.phase is Phase.QUANTIZED

    def freeze(self) -> None:
        """End calibration: from here on `forward` quantizes."""
        self.rivals = {}
        self.phase = Phase.QUANTIZED


class QWeighted(QModule):
    """A product with a weight of its own, which `freeze` replaces by integer codes.

    State after `freeze`: `weight_codes` (int8 up to 8 bits, int16 above; shifted by 2^(b-1) on affine grids so that
    they are signed) and the quantizers' parameters. `weight` is then a cache of the decoded codes and not saved.
    """

    operands: tuple[str, ...] = ("input",)
    segments: tuple[int, ...] = ()
    """Output features of each of several projections in one layer."""
    bias: Tensor | None
    weight_codes: Tensor | None

    def __init__(
        self,
        original: nn.Module,
        weight_quantizer: Quantizer | None,
        *input_quantizers: Quantizer | None,
    ) -> None:
        super().__init__(input_quantizers)
        self.weight: Tensor = original.get_parameter("weight")
        self.bias = cast(Tensor | None, getattr(original, "bias", None))
        self.weight_quantizer = weight_quantizer
        self.weight_dtype = self.weight.dtype
        self.register_buffer("weight_codes", None)
        self.register_load_state_dict_post_hook(_decode_loaded)
        self.training = original.training

    def product(self, *inputs: Tensor) -> Tensor:
        """Compute the product of the input with the weight the layer holds now."""
        return self.product_with(self.weight, *inputs)

    @abstractmethod
    def product_with(self, weight: Tensor, *inputs: Tensor) -> Tensor:
        """Compute the product of the input with `weight` in place of the layer's own."""

    def coded_weight(self) -> Tensor:
        """Return what of the weight the codes stand for, of its shape: all of it; detached."""
        return self.weight.detach()

    def rounded_weight(self) -> Tensor:
        """Return the weight that freezing would give the layer, of its shape and type."""
        quantizer = self.weight_quantizer
        return self.weight if quantizer is None else cast(Tensor, quantizer(self.coded_weight()))

    @property
    def quantizers(self) -> tuple[Quantizer | None, ...]:
        """The weight's quantizer, then those of the operands."""
        return (self.weight_quantizer, *super().quantizers)

    def freeze(self) -> None:
        """Replace the weight by its codes; without a weight quantizer the float weight stays."""
        quantizer = self.weight_quantizer
        if quantizer is not None:
            codes = quantizer.codes(self.coded_weight()) - storage_shift(quantizer)
            self.load_codes(codes.to(torch.int8 if quantizer.bits <= 8 else torch.int16))
        super().freeze()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if f"{prefix}weight_codes" in state_dict and "weight" in self._parameters:
            del self.weight  # codes take its place; they are decoded once the grid is there, too
            self.register_buffer("weight", None, persistent=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_codes(self, codes: Tensor) -> None:
        """Hold stored codes and the weight they decode to."""
        quantizer = cast(Quantizer, self.weight_quantizer)
        decoded = quantizer.decode(codes.int() + storage_shift(quantizer)).to(self.weight_dtype)
        self.weight_codes = codes
        del self.weight
        self.register_buffer("weight", decoded, persistent=False)


class QLinear(QWeighted):
    """Quantized `nn.Linear`: input (*, in), output (*, out).

    Attributes:
        input_divisor: By which each channel of the input is divided, in float, before anything else looks at it; the
            weight is multiplied by it. (in,), or `None` where the input is taken as it is.
    """

    id = "linear"
    input_divisor: Tensor | None

    def __init__(
        self, original: nn.Linear, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> None:
        super().__init__(original, weight_quantizer, input_quantizer)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.segments = getattr(original, "segments", (original.out_features,))
        self.register_buffer("input_divisor", None)
        self.register_forward_pre_hook(_divide_input)

    def product_with(self, weight: Tensor, *inputs: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`."""
        return F.linear(inputs[0], weight, self.bias)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """Answer `x @ layer`, the form in which open_clip applies its bare projections."""
        return cast(Tensor, self(x))


class QConv2d(QWeighted):
    """Quantized `nn.Conv2d`: input (B, C, H, W), zero or other padding applied to the rounded input."""

    id = "conv2d"

    def __init__(
        self, original: nn.Conv2d, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> None:
        super().__init__(original, weight_quantizer, input_quantizer)
        self.in_channels, self.out_channels = original.in_channels, original.out_channels
        self.kernel_size, self.stride = original.kernel_size, original.stride
        self.padding, self.dilation, self.groups = original.padding, original.dilation, original.groups
        self.padding_mode = original.padding_mode
        self._reversed_padding_repeated_twice = original._reversed_padding_repeated_twice

    def product_with(self, weight: Tensor, *inputs: Tensor) -> Tensor:
        """Return the convolution with the layer's stride, padding, dilation and groups."""
        return nn.Conv2d._conv_forward(cast(nn.Conv2d, self), inputs[0], weight, self.bias)


class QMatMul(QModule, Prefixed):
    """Quantized `a @ b` of two activations, batched over the leading axes; what a prefix adds is float."""

    id = "matmul"

    operands = ("a", "b")

    def __init__(self, original: MatMul, a_quantizer: Quantizer | None, b_quantizer: Quantizer | None) -> None:
        super().__init__((a_quantizer, b_quantizer))
        self.register_buffer("prefix_keys", original.prefix_keys)
        self.register_buffer("prefix_values", original.prefix_values)
        self.training = original.training

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute the product of the inputs, rounded first in `Phase.QUANTIZED`."""
        if self.prefix_size == 0:
            return super().forward(*inputs)
        return self.with_prefix(inputs[0], inputs[1], super().forward)

    def product(self, *inputs: Tensor) -> Tensor:
        """Return `a @ b`."""
        return inputs[0] @ inputs[1]


def _divide_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    divisor = module._buffers["input_divisor"]
    return None if divisor is None else (inputs[0] / divisor, *inputs[1:])


def _decode_loaded(module: QWeighted, _: Any) -> None:
    """Decode the codes that a state dict brought, after its grid was loaded."""
    quantizer = module.weight_quantizer
    waiting = module.weight_codes is not None and getattr(module, "weight", None) is None
    if waiting and quantizer is not None and quantizer.calibrated:
        module.load_codes(cast(Tensor, module.weight_codes))


def storage_shift(quantizer: Quantizer) -> int:
    """Return what is subtracted from a quantizer's codes so that the stored ones are signed."""
    return 2 ** (quantizer.bits - 1) if isinstance(quantizer, UniformQuantizer) and not quantizer.symmetric else 0
