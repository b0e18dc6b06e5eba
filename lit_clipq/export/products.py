"""How each kind of quantized layer becomes nodes whose product an integer kernel computes.

A float product between QuantizeLinear/DequantizeLinear pairs is what ONNX Runtime replaces by an integer kernel. A
class of layers declares its form with `@form`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from lit_clipq.export.graph import Array, Graph, Product
from lit_clipq.nn.embedding import QEmbedding
from lit_clipq.nn.integer import Affine, NotExportable, TwoBranches
from lit_clipq.nn.modules import QConv2d, QLinear, QMatMul, QModule, QWeighted, storage_shift
from lit_clipq.nn.quantizer import Quantizer
from lit_clipq.nn.start_token import StartTokenAverage, StartTokenScores

UNIFORM = "choose a grid per tensor (the default of activations)"


class Form(ABC):
    """The nodes of one layer.

    Args:
        layer: The quantized layer.
        fallback: Whether the layer is kept float: with the weight its codes stand for, and no grid on its inputs.

    Attributes:
        reason: Why it is kept float; empty otherwise.
    """

    reason = ""

    classes: ClassVar[dict[type[QModule], type["Form"]]] = {}

    def __init__(self, layer: Any, *, fallback: bool = False) -> None:
        self.layer = layer
        self.fallback = fallback

    @abstractmethod
    def check(self) -> None:
        """Refuse what no integer kernel computes.

        Raises:
            NotExportable: Says why, and what to change.
        """

    @abstractmethod
    def shape(self, *inputs: Tensor) -> Tensor:
        """Return an empty output for fake inputs."""

    @abstractmethod
    def emit(self, graph: Graph, product: Product, *inputs: str) -> str:
        """Add the nodes; set the product's core; return the name of the float output."""

    @property
    def is_integer(self) -> bool:
        """Whether the product is one of integers: all of its operands have grids."""
        return not self.fallback and all(quantizer is not None for quantizer in self.layer.quantizers)

    def grid(self, operand: str) -> Affine | TwoBranches | None:
        """Return the integer form of an operand's grid; `None` where it stays float."""
        quantizer = None if self.fallback else self.layer.operand_quantizers.get(operand)
        return None if quantizer is None else cast(Quantizer, quantizer).integer_form()


def form(kind: type[QModule]) -> Callable[[type[Form]], type[Form]]:
    """Declare the form of a class of quantized layers; a subclass that declares none has none."""

    def add(declared: type[Form]) -> type[Form]:
        Form.classes[kind] = declared
        return declared

    return add


def form_of(layer: QModule, *, fallback: bool = False) -> Form:
    """Return the form of a layer, checked.

    Raises:
        NotExportable: The class declares none, or the layer has a grid without an integer form.
    """
    declared = Form.classes.get(type(layer))
    if declared is None:
        raise NotExportable(f"layers of kind {layer.id!r} have no integer form", "exclude the layer")
    made = declared(layer, fallback=fallback)
    made.check()
    return made


# ---------------------------------------------------------------- operands


def quantized(graph: Graph, x: str, grid: Affine) -> str:
    """Round a float tensor to unsigned bytes; returns the name of the codes.

    Symmetric grids are shifted by 128. Grids of fewer codes than a byte has are clipped in front.
    """
    scale, zero = _numpy(grid.scale, np.float32), int(grid.zero_point)
    if grid.qmax - grid.qmin != 255:
        ends = [(np.float32(code - zero) * scale).astype(np.float32) for code in (grid.qmin, grid.qmax)]
        x = graph.node("Clip", x, graph.store(ends[0], "low"), graph.store(ends[1], "high"))
    step, middle = _grid_arrays(graph, scale, _zero(grid))
    return graph.node("QuantizeLinear", x, step, middle)


def dequantized(graph: Graph, codes: str, scale: Array, zero: Any, **attributes: Any) -> str:
    """Add a DequantizeLinear with a scale and zero point of its own."""
    return graph.node("DequantizeLinear", codes, *_grid_arrays(graph, scale, zero), **attributes)


def rounded(graph: Graph, x: str, grid: Affine | None) -> str:
    """Round a float tensor to its grid and back; without a grid it is returned as it is."""
    if grid is None:
        return x
    codes = quantized(graph, x, grid)
    return dequantized(graph, codes, _numpy(grid.scale, np.float32), _zero(grid))


def branches(graph: Graph, x: str, grid: TwoBranches) -> str:
    """Round both halves of a twin grid and stack their codes along the rows; returns values in units of codes.

    The result has twice the rows: first those of x below the split, then the others; `merged` undoes it.
    """
    halves = []
    for half, below in ((grid.below, True), (grid.above, False)):
        y = _half(graph, x, grid, below=below)
        if half.step < 0:
            y = graph.node("Neg", y)
        step, zero = _grid_arrays(graph, np.float32(abs(half.step)), np.uint8(0))
        halves.append(graph.node("QuantizeLinear", y, step, zero))
    stacked = graph.node("Concat", *halves, axis=-2)
    return dequantized(graph, stacked, np.float32(1), np.uint8(0))


def merged(graph: Graph, y: str, grid: TwoBranches) -> str:
    """Add up the two halves of a product of `branches`, each times its step."""
    parts = graph.nodes_of("Split", [y], 2, axis=-2, num_outputs=2)
    scaled = [
        graph.node("Mul", part, graph.store(np.float32(half.step), "step"))
        for part, half in zip(parts, (grid.below, grid.above), strict=True)
    ]
    return graph.node("Add", *scaled)


def _half(graph: Graph, x: str, grid: TwoBranches, *, below: bool) -> str:
    """Return x where it belongs to a half and 0 elsewhere, inside the range of the half's codes."""
    half = grid.below if below else grid.above
    end = np.float32(half.step * half.most)
    zero = np.float32(0)
    if grid.split == 0:
        low, high = (end, zero) if below else (zero, end)
        return graph.node("Clip", x, graph.store(low, "low"), graph.store(high, "high"))
    side = graph.node("Less", x, graph.store(np.float32(grid.split), "split"))
    nothing = graph.store(zero, "zero")
    return graph.node("Where", side, *((x, nothing) if below else (nothing, x)))


def _grid_arrays(graph: Graph, scale: Array | np.float32, zero: Any) -> tuple[str, str]:
    return graph.store(np.asarray(scale), "scale"), graph.store(np.asarray(zero), "zero_point")


def _matrix(weight: Array, order: tuple[int, ...] | None) -> Array:
    """Return a weight (out, ...) as (in, out)."""
    if order is None:
        return weight.reshape(len(weight), -1).T
    return weight.transpose(order).reshape(-1, len(weight))


def _zero(grid: Affine) -> np.uint8:
    """Return the zero point of an activation's unsigned codes."""
    return np.uint8(int(grid.zero_point) + (128 if grid.qmin < 0 else 0))


def _numpy(x: Tensor, dtype: Any) -> Array:
    return x.detach().cpu().numpy().astype(dtype)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- layers


class WeightedForm(Form):
    """What layers with a weight share."""

    layer: QWeighted

    def check(self) -> None:
        """See `Form.check`; the weight's grid is uniform and its scales run along output channels."""
        if self.fallback:
            return
        grid, x = self.weight_grid(), self.grid("input") if self.layer.operands else None
        if x is not None and grid is None:
            raise NotExportable("its input is quantized and its weight is not", "give the weight at most 8 bits")
        if grid is not None and grid.axis not in (None, 0):
            raise NotExportable("the weight's scales run along its inputs", "choose scales per output channel")
        if grid is not None and x is not None and grid.group_size is not None:
            raise NotExportable(
                "groups of a weight have scales of their own, which no kernel multiplies with integers",
                "choose scales per output channel, or leave the activations float (activation_bits: 32)",
            )
        _check_per_tensor(x)

    def weight_grid(self) -> Affine | None:
        """Return the weight's grid; `None` where it stays float."""
        quantizer = self.layer.weight_quantizer
        if self.fallback or quantizer is None:
            return None
        grid = quantizer.integer_form()
        if not isinstance(grid, Affine):
            raise NotExportable("the weight has a twin grid", "choose a uniform grid for weights")
        return grid

    def codes(self) -> Array:
        """Return the weight's codes as they are stored, int8."""
        return _numpy(cast(Tensor, self.layer.weight_codes), np.int8)

    def zero_points(self, grid: Affine) -> Array:
        """Return the zero points of the stored codes, int8."""
        return _numpy(grid.zero_point - storage_shift(cast(Quantizer, self.layer.weight_quantizer)), np.int8)

    def store_codes(self, graph: Graph, codes: Array) -> str:
        """Store codes as int8, or at up to 4 bits in half a byte each and cast when the file is loaded."""
        if cast(Quantizer, self.layer.weight_quantizer).bits > 4:
            return graph.store(codes, "weight")
        return graph.node("Cast", graph.store_int4(codes, "weight"), to=TensorProto.INT8)

    def matrix(self, graph: Graph, grid: Affine | None, order: tuple[int, ...] | None = None) -> str:
        """Return the weight as a float matrix (in, out), behind a DequantizeLinear where it has a grid.

        Args:
            graph: What is added to.
            grid: Of the weight.
            order: Of the weight's axes in the matrix, the outputs last; `None` puts the first one last.
        """
        if grid is None:
            weight = _numpy(self.layer.weight, np.float32)
            return graph.store(_matrix(weight, order), "weight")
        codes = _matrix(self.codes(), order)
        scale, zero = _numpy(grid.scale, np.float32), self.zero_points(grid)
        stored = self.store_codes(graph, np.ascontiguousarray(codes))
        if grid.group_size is not None:  # (out, groups, 1) -> (groups, out)
            return dequantized(graph, stored, scale[..., 0].T, zero[..., 0].T, axis=0, block_size=grid.group_size)
        return dequantized(graph, stored, scale, zero, **({} if grid.axis is None else {"axis": 1}))

    def bias_codes(self, graph: Graph, x: Affine) -> str:
        """Store the bias in steps of the products, int32: the kernel adds it to its sums. No bias is one of zeros."""
        grid, bias = cast(Affine, self.weight_grid()), self.layer.bias
        scale = np.float32(_numpy(x.scale, np.float32) * _numpy(grid.scale, np.float32))
        values = np.zeros(len(self.codes())) if bias is None else _numpy(bias, np.float64)
        steps = np.rint(values / scale).clip(-(2**31), 2**31 - 1).astype(np.int32)
        axis = {} if grid.axis is None else {"axis": 0}
        return dequantized(graph, graph.store(steps, "bias"), scale, np.zeros(scale.shape, np.int32), **axis)

    def biased(self, graph: Graph, y: str) -> str:
        """Add the bias."""
        bias = self.layer.bias
        return y if bias is None else graph.node("Add", y, graph.store(_numpy(bias, np.float32), "bias"))


@form(QLinear)
class LinearForm(WeightedForm):
    """x (*, in) times the weight (in, out), then the bias."""

    layer: QLinear

    def shape(self, *inputs: Tensor) -> Tensor:
        """See `Form.shape`."""
        return inputs[0].new_empty(*inputs[0].shape[:-1], self.layer.out_features)

    def emit(self, graph: Graph, product: Product, *inputs: str) -> str:
        """See `Form.emit`."""
        grid = self.grid("input")
        weight = self.matrix(graph, self.weight_grid())
        flat = len(product.shapes[0]) == 2  # there the runtime joins product and bias, in float unless both are integer
        if flat and isinstance(grid, Affine) and self.layer.bias is not None and self.is_integer:
            bias = self.bias_codes(graph, grid)
            y = graph.node("Gemm", rounded(graph, inputs[0], grid), weight, bias, name=f"{product.name}/Gemm")
            product.core = graph.nodes[-1].name
            return y
        x = branches(graph, inputs[0], grid) if isinstance(grid, TwoBranches) else rounded(graph, inputs[0], grid)
        y = graph.node("MatMul", x, weight, name=f"{product.name}/MatMul")
        product.core = graph.nodes[-1].name
        return self.biased(graph, merged(graph, y, grid) if isinstance(grid, TwoBranches) else y)


@form(QConv2d)
class ConvForm(WeightedForm):
    """A convolution, or the product of its patches.

    ONNX Runtime has an integer convolution where the output is rounded at once to the grid of the next layer. Elsewhere
    the patches are gathered as codes, channels last, and multiplied by the weight like the rows of a linear layer.
    """

    layer: QConv2d

    def check(self) -> None:
        """See `Form.check`."""
        super().check()
        if self.layer.padding_mode != "zeros" or isinstance(self.layer.padding, str):
            raise NotExportable(f"it pads by {self.layer.padding_mode} {self.layer.padding}", "exclude the layer")
        if isinstance(self.grid("input"), TwoBranches):
            raise NotExportable("a convolution's input has a twin grid", "choose a uniform one (gelu_grid: uniform)")

    def shape(self, *inputs: Tensor) -> Tensor:
        """See `Form.shape`."""
        layer, x = self.layer, inputs[0]
        weight = x.new_empty(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    def emit(self, graph: Graph, product: Product, *inputs: str) -> str:
        """See `Form.emit`."""
        grid, layer = cast(Affine | None, self.grid("input")), self.layer
        free = any(not isinstance(n, int) for n in product.shapes[0][-2:])
        if grid is None or product.meets_grid or layer.groups > 1 or free:
            return self._convolution(graph, product, inputs[0], grid)
        codes = quantized(graph, inputs[0], grid)
        disjoint = tuple(layer.kernel_size) == tuple(layer.stride) and layer.kernel_size != (1, 1)
        divides = all(n % k == 0 for n, k in zip(product.shapes[0][-2:], layer.kernel_size, strict=True))
        tiled = disjoint and divides and set(layer.padding) == {0} and set(layer.dilation) == {1}
        patches = self._tiles(graph, product, codes) if tiled else self._windows(graph, product, codes, grid)
        x = dequantized(graph, patches, _numpy(grid.scale, np.float32), _zero(grid))
        order = None if tiled else (2, 3, 1, 0)  # windows have their channels last
        y = graph.node("MatMul", x, self.matrix(graph, self.weight_grid(), order), name=f"{product.name}/MatMul")
        product.core = graph.nodes[-1].name
        return graph.node("Transpose", self.biased(graph, y), perm=[0, 3, 1, 2])

    def _tiles(self, graph: Graph, product: Product, codes: str) -> str:
        """Cut (B, C, H, W) into windows side by side: (B, h, w, C * rows * columns)."""
        (rows, columns), channels = self.layer.kernel_size, self.layer.in_channels
        h, w = product.shapes[0][-2] // rows, product.shapes[0][-1] // columns
        cut = graph.node("Reshape", codes, graph.store(np.array([-1, channels, h, rows, w, columns]), "windows"))
        turned = graph.node("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
        return graph.node("Reshape", turned, graph.store(np.array([-1, h, w, channels * rows * columns]), "patches"))

    def _windows(self, graph: Graph, product: Product, codes: str, grid: Affine) -> str:
        """Gather the windows of (B, C, H, W): (B, h, w, rows * columns * C)."""
        layer = self.layer
        x = graph.node("Transpose", codes, perm=[0, 2, 3, 1])
        (top, left), (down, across) = cast(tuple[int, int], layer.padding), layer.stride
        if top or left:
            pads = graph.store(np.array([0, top, left, 0, 0, top, left, 0]), "pads")
            x = graph.node("Pad", x, pads, graph.store(np.asarray(_zero(grid)), "padding"))
        (rows, columns), (apart, aside) = layer.kernel_size, layer.dilation
        if (rows, columns) == (1, 1) and (down, across) == (1, 1):
            return x
        height, width = product.shapes[0][-2] + 2 * top, product.shapes[0][-1] + 2 * left
        h = (height - apart * (rows - 1) - 1) // down + 1
        w = (width - aside * (columns - 1) - 1) // across + 1
        parts = []
        for i in range(0, rows * apart, apart):
            for j in range(0, columns * aside, aside):
                ends = ([i, j], [i + down * (h - 1) + 1, j + across * (w - 1) + 1], [1, 2], [down, across])
                parts.append(graph.node("Slice", x, *(graph.store(np.array(end), "slice") for end in ends)))
        return graph.node("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]

    def _convolution(self, graph: Graph, product: Product, x: str, grid: Affine | None) -> str:
        layer, weights = self.layer, self.weight_grid()
        operands = [rounded(graph, x, grid)]
        if weights is None:
            operands.append(graph.store(_numpy(layer.weight, np.float32), "weight"))
        else:
            scale, zero = _numpy(weights.scale, np.float32), self.zero_points(weights)
            axis = {} if weights.axis is None else {"axis": 0}
            operands.append(dequantized(graph, self.store_codes(graph, self.codes()), scale, zero, **axis))
        if weights is not None and grid is not None:
            operands.append(self.bias_codes(graph, grid))
        elif layer.bias is not None:
            operands.append(graph.store(_numpy(layer.bias, np.float32), "bias"))
        pads = [*layer.padding, *layer.padding]
        options = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups, "pads": pads}
        y = graph.node("Conv", *operands, name=f"{product.name}/Conv", kernel_shape=layer.kernel_size, **options)
        product.core = graph.nodes[-1].name
        return y


@form(QMatMul)
class MatMulForm(Form):
    """Product of two activations."""

    layer: QMatMul

    def check(self) -> None:
        """See `Form.check`."""
        if self.layer.prefix_size:
            raise NotExportable("a prefix of keys and values is no part of the export", "leave out the registers")
        grids = [self.grid(operand) for operand in self.layer.operands]
        if (grids[0] is None) != (grids[1] is None):
            raise NotExportable("only one operand of the product is quantized", "quantize both or none")
        if isinstance(grids[1], TwoBranches):
            raise NotExportable("the right operand has a twin grid", "choose a uniform grid for it")
        for grid in grids:
            _check_per_tensor(grid)

    def shape(self, *inputs: Tensor) -> Tensor:
        """See `Form.shape`."""
        return torch.matmul(inputs[0], inputs[1])

    def emit(self, graph: Graph, product: Product, *inputs: str) -> str:
        """See `Form.emit`."""
        grid = self.grid("a")
        b = rounded(graph, inputs[1], cast(Affine | None, self.grid("b")))
        a = branches(graph, inputs[0], grid) if isinstance(grid, TwoBranches) else rounded(graph, inputs[0], grid)
        y = graph.node("MatMul", a, b, name=f"{product.name}/MatMul")
        product.core = graph.nodes[-1].name
        return merged(graph, y, grid) if isinstance(grid, TwoBranches) else y


@form(StartTokenScores)
class StartScoresForm(MatMulForm):
    """Scores whose first column is a float product with the start token's key."""

    layer: StartTokenScores

    def emit(self, graph: Graph, product: Product, *inputs: str) -> str:
        """See `Form.emit`."""
        scores = super().emit(graph, product, *inputs)
        if self.fallback or self.layer.constant is None:
            return scores
        key = graph.store(_numpy(self.layer.constant, np.float32), "start_key")
        first = graph.node("MatMul", inputs[0], key)
        return graph.node("Concat", first, _from_second(graph, scores, -1), axis=-1)


@form(StartTokenAverage)
class StartAverageForm(MatMulForm):
    """Averages in which the start token's term is float."""

    layer: StartTokenAverage

    def emit(self, graph: Graph, product: Product, *inputs: str) -> str:
        """See `Form.emit`."""
        if self.fallback or self.layer.constant is None:
            return super().emit(graph, product, *inputs)
        weights, values = inputs
        rest = super().emit(graph, product, _from_second(graph, weights, -1), _from_second(graph, values, -2))
        start, end, axis = (graph.store(np.array([i]), "index") for i in (0, 1, -1))
        first = graph.node("Slice", weights, start, end, axis)
        value = graph.store(_numpy(self.layer.constant, np.float32), "start_value")
        return graph.node("Add", rest, graph.node("Mul", first, value))


@form(QEmbedding)
class EmbeddingForm(WeightedForm):
    """Rows of a table of codes, looked up as codes and decoded behind."""

    layer: QEmbedding

    @property
    def is_integer(self) -> bool:
        """Never: a table multiplies nothing."""
        return False

    def shape(self, *inputs: Tensor) -> Tensor:
        """See `Form.shape`."""
        return torch.empty(*inputs[0].shape, self.layer.embedding_dim, device=inputs[0].device)

    def emit(self, graph: Graph, product: Product, *inputs: str) -> str:  # noqa: ARG002
        """See `Form.emit`."""
        grid, ids = self.weight_grid(), inputs[0]
        if grid is None:
            return graph.node("Gather", graph.store(_numpy(self._float_table(), np.float32), "table"), ids, axis=0)
        rows = graph.node("Gather", self.store_codes(graph, self.codes()), ids, axis=0)
        rows = graph.node("Cast", rows, to=TensorProto.FLOAT)
        scale, zero = _numpy(grid.scale, np.float32), self.zero_points(grid).astype(np.float32)
        if grid.axis is None and grid.group_size is None:
            return self._decoded(graph, rows, graph.store(scale, "scale"), zero, graph.store(zero, "zero_point"))
        groups = scale.reshape(len(scale), -1)  # (V, groups)
        stored = [graph.store(a.reshape(groups.shape), wish) for a, wish in ((scale, "scale"), (zero, "zero_point"))]
        steps, zeros = (graph.node("Gather", name, ids, axis=0) for name in stored)
        if groups.shape[1] == 1:
            return self._decoded(graph, rows, steps, zero, zeros)
        last = graph.store(np.array([-1]), "last")
        folded = graph.store(np.array([0, 0, groups.shape[1], -1]), "folded")
        rows = graph.node("Reshape", rows, folded)
        steps, zeros = (graph.node("Unsqueeze", x, last) for x in (steps, zeros))
        flat = graph.store(np.array([0, 0, self.layer.embedding_dim]), "flat")
        return graph.node("Reshape", self._decoded(graph, rows, steps, zero, zeros), flat)

    def _float_table(self) -> Tensor:
        codes = self.layer.weight_codes
        if codes is None:
            return self.layer.weight
        return self.layer._decode(torch.arange(self.layer.num_embeddings, device=codes.device))

    @staticmethod
    def _decoded(graph: Graph, rows: str, steps: str, zero: Array, zeros: str) -> str:
        return graph.node("Mul", graph.node("Sub", rows, zeros) if zero.any() else rows, steps)


def _check_per_tensor(grid: Affine | TwoBranches | None) -> None:
    if isinstance(grid, Affine) and (grid.axis is not None or grid.group_size is not None):
        raise NotExportable("an activation's scales run along an axis", UNIFORM)


def _from_second(graph: Graph, x: str, axis: int) -> str:
    ends = (graph.store(np.array([i]), "index") for i in (1, 2**63 - 1, axis))
    return graph.node("Slice", x, *ends)
