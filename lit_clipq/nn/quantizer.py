"""Quantizers: a grid, its calibrated parameters, and nothing else. Layers compose them."""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from lit_clipq.functional.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    at_run_time,
    extrema,
    granularity_of,
    named_granularity,
)
from lit_clipq.functional.log import log_codes, log_decode, log_fake_quantize
from lit_clipq.functional.twin import (
    gelu_codes,
    gelu_decode,
    gelu_fake_quantize,
    softmax_codes,
    softmax_decode,
    softmax_fake_quantize,
)
from lit_clipq.functional.uniform import affine_parameters, code_range, fake_quantize, from_codes, to_codes
from lit_clipq.nn.integer import Affine, Branch, IntegerForm, NotExportable, TwoBranches
from lit_clipq.nn.state import LateBuffers


class Quantizer(LateBuffers):
    """A grid of 2 to 16 bits. Its parameters are buffers, `None` until calibration gave them.

    Attributes:
        kinds: Every quantizer by its `id`.
        id: What saved models call the class; by default its name.
    """

    kinds: ClassVar[dict[str, type["Quantizer"]]] = {}
    id: ClassVar[str]
    granularity: Granularity = PerTensor()
    bits: int

    def __init_subclass__(cls) -> None:
        """Make the class known by its id."""
        cls.id = cls.__dict__.get("id", cls.__name__)
        Quantizer.kinds[cls.id] = cls

    @property
    def calibrated(self) -> bool:
        """Whether the grid has its parameters."""
        return all(buffer is not None for buffer in self._buffers.values())

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the options of the class as plain values; `from_config` of them builds an equal, empty quantizer."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to the grid and back; shape and dtype of `x`."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Return the int32 codes of `x`, same shape."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of integer `codes`, same shape."""

    def integer_form(self) -> IntegerForm:
        """Say what integer kernels see of the grid.

        Raises:
            NotExportable: There is no integer form, which is what a grid says that does not override this.
        """
        raise NotExportable(f"the grid {self.id!r} has no integer form", "choose a uniform or a twin grid")

    @staticmethod
    def from_config(config: dict[str, Any]) -> "Quantizer":
        """Build the quantizer that `config` describes, without parameters."""
        options = dict(config)
        return Quantizer.kinds[options.pop("type")](**options)

    def _need(self, name: str) -> Tensor:
        value = self._buffers.get(name)
        if value is None:
            raise RuntimeError(f"this {type(self).__name__} holds no {name}; calibrate it before the quantized forward")
        return value

    def extra_repr(self) -> str:
        """Options, for printing."""
        return ", ".join(f"{name}={value}" for name, value in self.config().items() if name != "type")


class UniformQuantizer(Quantizer):
    """Uniform affine grid of 2 to 16 bits.

    The scale (float32) and zero point (int32) come from `set_range` or `load_parameters`, except for `PerToken` and
    `PerSample`, which compute both from each input.

    Args:
        bits: Width of the codes, 2 to 16.
        symmetric: Codes -2^(b-1) .. 2^(b-1) - 1 around 0 instead of 0 .. 2^b - 1.
        granularity: What shares a scale; also as the pair [name, argument] that `config` gives.
        restricted: Symmetric grids only: represent the largest magnitude exactly.
    """

    id = "uniform"
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool,
        granularity: Granularity | list[Any] | None = None,
        restricted: bool = False,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        if isinstance(granularity, list):
            granularity = granularity_of(granularity)
        self.granularity = granularity or PerTensor()  # type: ignore[assignment]
        self.restricted = restricted
        self.qmin, self.qmax = code_range(bits, symmetric=symmetric)
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def calibrated(self) -> bool:
        """Whether the grid has its parameters, or needs none."""
        return at_run_time(self.granularity) or super().calibrated

    def config(self) -> dict[str, Any]:
        """Return the options as plain values."""
        granularity = named_granularity(self.granularity)
        return {
            "type": self.id,
            "bits": self.bits,
            "symmetric": self.symmetric,
            "granularity": granularity,
            "restricted": self.restricted,
        }

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the grid that spans [low, high]; both of the scale shape, finite."""
        self.scale, self.zero_point = self._grid_spanning(low, high)

    def load_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a scale (float32) and zero point (int32) as they are."""
        self.scale, self.zero_point = scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` (any shape that fits the granularity) to the grid and back.

        Raises:
            RuntimeError: If the grid was never calibrated.
        """
        scale, zero_point = self._grid_for(x)
        return fake_quantize(x, scale, zero_point, self.qmin, self.qmax, self.granularity)

    def codes(self, x: Tensor) -> Tensor:
        """Return the int32 codes of `x`, same shape."""
        scale, zero_point = self._grid_for(x)
        return to_codes(x, scale, zero_point, self.qmin, self.qmax, self.granularity)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of integer `codes`, same shape.

        Raises:
            RuntimeError: If the grid was never calibrated, or is computed per input.
        """
        return from_codes(codes, self._need("scale"), self._need("zero_point"), self.granularity)

    def integer_form(self) -> Affine:
        """Return scale, zero point and range of codes.

        Raises:
            NotExportable: Above 8 bits, or where scales are computed from every input.
        """
        if self.bits > 8:
            raise NotExportable(f"codes of {self.bits} bits do not fit int8", "give at most 8 bits (bits: 8)")
        if at_run_time(self.granularity):
            raise NotExportable("scales are computed from every input", "choose a grid per tensor")
        axis = self.granularity.axis if isinstance(self.granularity, PerChannel) else None
        group = self.granularity.size if isinstance(self.granularity, PerGroup) else None
        return Affine(self._need("scale"), self._need("zero_point"), self.qmin, self.qmax, axis, group)

    def _grid_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if at_run_time(self.granularity):
            return self._grid_spanning(*extrema(x.detach(), self.granularity))
        return self._need("scale"), self._need("zero_point")

    def _grid_spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_parameters(low, high, self.bits, symmetric=self.symmetric, restricted=self.restricted)


class TwinSoftmaxQuantizer(Quantizer):
    """Twin uniform grid for attention weights; see `lit_clipq.functional.twin`.

    Args:
        bits: Width of the codes.
    """

    id = "twin_softmax"
    split: Tensor | None

    def __init__(self, bits: int) -> None:
        super().__init__()
        code_range(bits, symmetric=False)
        self.bits = bits
        self.register_buffer("split", None)

    def config(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {"type": self.id, "bits": self.bits}

    def forward(self, x: Tensor) -> Tensor:
        """Round values in [0, 1] to the grid and back."""
        return softmax_fake_quantize(x, self._need("split"), self.bits)

    def codes(self, x: Tensor) -> Tensor:
        """Return the int32 codes 0 .. 2^b - 1, same shape."""
        return softmax_codes(x, self._need("split"), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of `codes`, same shape."""
        return softmax_decode(codes, self._need("split"), self.bits)

    def integer_form(self) -> TwoBranches:
        """Return the two ranges: from 0 to the split, and from 0 to 1 for what is not below it."""
        most, split = _twin_codes(self.bits) - 1, float(self._need("split"))
        return TwoBranches(split, Branch(split / most, most), Branch(1 / most, most))


class TwinGeluQuantizer(Quantizer):
    """Twin uniform grid behind GELU-like activations; see `lit_clipq.functional.twin`.

    Args:
        bits: Width of the codes.
        minimum: Smallest value the activation can take, negative; it fixes the negative step.
    """

    id = "twin_gelu"
    positive_step: Tensor | None
    negative_step: Tensor

    def __init__(self, bits: int, minimum: float) -> None:
        super().__init__()
        code_range(bits, symmetric=True)
        if not minimum < 0:
            raise ValueError(f"expected the negative minimum of an activation, got {minimum}")
        self.bits = bits
        self.minimum = minimum
        self.register_buffer("negative_step", Tensor([-minimum / 2 ** (bits - 1)]).squeeze(), persistent=False)
        self.register_buffer("positive_step", None)

    def config(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {"type": self.id, "bits": self.bits, "minimum": self.minimum}

    def forward(self, x: Tensor) -> Tensor:
        """Round activations to the grid and back."""
        return gelu_fake_quantize(x, self.negative_step, self._need("positive_step"), self.bits)

    def codes(self, x: Tensor) -> Tensor:
        """Return the int32 codes -2^(b-1) .. 2^(b-1) - 1, same shape."""
        return gelu_codes(x, self.negative_step, self._need("positive_step"), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of `codes`, same shape."""
        return gelu_decode(codes, self.negative_step, self._need("positive_step"))

    def integer_form(self) -> TwoBranches:
        """Return the two ranges on either side of 0."""
        n = _twin_codes(self.bits)
        negative, positive = float(self.negative_step), float(self._need("positive_step"))
        return TwoBranches(0.0, Branch(-negative, n), Branch(positive, n - 1))


class LogQuantizer(Quantizer):
    """Logarithmic grid for values in [0, 1]; see `lit_clipq.functional.log`. It needs no calibration.

    Args:
        bits: Width of the codes.
        steps_per_octave: 1 for base 2, 2 for base sqrt 2.
    """

    id = "log"

    def __init__(self, bits: int, steps_per_octave: int = 1) -> None:
        super().__init__()
        code_range(bits, symmetric=False)
        self.bits = bits
        self.steps_per_octave = steps_per_octave

    def config(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {"type": self.id, "bits": self.bits, "steps_per_octave": self.steps_per_octave}

    def forward(self, x: Tensor) -> Tensor:
        """Round values in [0, 1] to the grid and back."""
        return log_fake_quantize(x, self.bits, steps_per_octave=self.steps_per_octave)

    def codes(self, x: Tensor) -> Tensor:
        """Return the int32 codes 0 .. 2^b - 1, same shape."""
        return log_codes(x, self.bits, steps_per_octave=self.steps_per_octave)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of `codes`, same shape."""
        return log_decode(codes, self.bits, steps_per_octave=self.steps_per_octave)


def _twin_codes(bits: int) -> int:
    """Return the codes of one half of a twin grid.

    Raises:
        NotExportable: Where they do not fit an unsigned byte.
    """
    if bits > 8:
        raise NotExportable(f"codes of {bits} bits do not fit int8", "give at most 8 bits (bits: 8)")
    return int(2 ** (bits - 1))
