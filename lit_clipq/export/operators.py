"""ATen operators as ONNX nodes: one function each, by the names that a trace has.

Shapes come from the trace: what is free there is called by a size of the input, copied (0), or left open (-1).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, fx

from lit_clipq.errors import ConfigError
from lit_clipq.export.trace import OPERATORS, Emit, Ref, Size, Tracer, Value

_ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}
_LAST = 2**63 - 1


def operator(*names: str) -> Callable[[Emit], Emit]:
    """Register what emits operators of these names."""

    def add(function: Emit) -> Emit:
        for name in names:
            OPERATORS[name] = function
        return function

    return add


def _plain(name: str, onnx: str) -> None:
    """Register an operator of one tensor that ONNX has as well."""

    def emit(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
        return tracer.result(node, tracer.graph.node(onnx, tracer.name(values[0])))

    OPERATORS[f"aten.{name}.default"] = emit


for _name, _onnx in (
    ("relu", "Relu"), ("sigmoid", "Sigmoid"), ("tanh", "Tanh"), ("exp", "Exp"), ("sqrt", "Sqrt"), ("neg", "Neg"),
    ("erf", "Erf"), ("hardswish", "HardSwish"), ("logical_not", "Not"), ("bitwise_not", "Not"), ("abs", "Abs"),
):  # fmt: skip
    _plain(_name, _onnx)


def _same(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:  # noqa: ARG001
    return values[0]


for _name in (
    "contiguous.default", "dropout.default", "clone.default", "detach.default", "alias.default", "detach_.default",
    "_assert_tensor_metadata.default", "feature_dropout.default", "lift_fresh_copy.default",
):  # fmt: skip
    OPERATORS[f"aten.{_name}"] = _same


def _shape(value: Value) -> torch.Size:
    return value.value.shape if isinstance(value, Ref) else value.shape  # type: ignore[no-any-return]


def _rank(value: Value) -> int:
    return len(_shape(value))


# ---------------------------------------------------------------- arithmetic


def _binary(names: Sequence[str], onnx: str) -> None:
    def emit(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
        left, right = values[:2]
        if len(values) > 2 and values[2] not in (1, None):
            raise ConfigError(f"the operator {node.target} with alpha {values[2]} is not known to the ONNX export")
        if isinstance(node.meta["val"], torch.SymInt):
            return _size_arithmetic(tracer, onnx, left, right)
        kind = node.meta["val"].dtype
        if kind == torch.bool:
            kind = torch.promote_types(_dtype(left), _dtype(right))
        operands = [_as(tracer, value, kind) for value in (left, right)]
        return tracer.result(node, tracer.graph.node(onnx, *operands))

    for name in names:
        OPERATORS[name] = emit


def _dtype(value: Value) -> torch.dtype:
    if isinstance(value, Ref):
        return value.value.dtype
    return value.dtype if isinstance(value, Tensor) else torch.bool  # a plain number adapts


def _as(tracer: Tracer, value: Value, kind: torch.dtype) -> str:
    """Return the name of a tensor or number in a type."""
    if isinstance(value, Ref):
        return value.name if value.value.dtype == kind else tracer.graph.node("Cast", value.name, to=_ONNX_TYPES[kind])
    if isinstance(value, Size):
        return value.name
    if isinstance(value, Tensor):
        return tracer.name(value) if value.dtype == kind else tracer.name(value.to(kind))
    return tracer.graph.store(torch.tensor(value, dtype=kind).numpy(), "number")


def _size_arithmetic(tracer: Tracer, onnx: str, left: Value, right: Value) -> Size:
    names = [value.name if isinstance(value, Size) else tracer.ints(value) for value in (left, right)]
    return Size(tracer.graph.node(onnx, *names))


for _names, _onnx in (
    (("aten.add.Tensor", "aten.add.Scalar", "<built-in function add>"), "Add"),
    (("aten.sub.Tensor", "aten.sub.Scalar", "<built-in function sub>"), "Sub"),
    (("aten.mul.Tensor", "aten.mul.Scalar", "<built-in function mul>"), "Mul"),
    (("aten.div.Tensor", "aten.div.Scalar", "<built-in function floordiv>"), "Div"),
    (("aten.pow.Tensor_Scalar",), "Pow"),
    (("aten.eq.Scalar", "aten.eq.Tensor"), "Equal"),
    (("aten.lt.Scalar", "aten.lt.Tensor"), "Less"),
    (("aten.gt.Scalar", "aten.gt.Tensor"), "Greater"),
    (("aten.ge.Scalar", "aten.ge.Tensor"), "GreaterOrEqual"),
    (("aten.le.Scalar", "aten.le.Tensor"), "LessOrEqual"),
    (("aten.matmul.default", "aten.bmm.default"), "MatMul"),
    (("aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.__and__.Tensor"), "And"),
):
    _binary(_names, _onnx)


@operator("aten.ne.Scalar", "aten.ne.Tensor")
def _ne(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    equal: Any = OPERATORS["aten.eq.Tensor"](tracer, node, values)
    return tracer.result(node, tracer.graph.node("Not", equal.name))


@operator("aten.to.dtype", "aten._to_copy.default", "aten.type_as.default", "aten.float.default")
def _to(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    kind = node.meta["val"].dtype
    if isinstance(values[0], Ref) and values[0].value.dtype == kind:
        return values[0]
    if kind not in _ONNX_TYPES:
        raise ConfigError(f"the tower computes in {kind}, which the ONNX export does not write; load it in fp32")
    return tracer.result(node, _as(tracer, values[0], kind))


@operator("aten.masked_fill.Scalar")
def _masked_fill(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, mask, value = values[:3]
    number = tracer.scalar(value, x)
    return tracer.result(node, tracer.graph.node("Where", tracer.name(mask), number, tracer.name(x)))


@operator("aten.where.self")
def _where(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    return tracer.result(node, tracer.graph.node("Where", *(tracer.name(value) for value in values)))


@operator("aten.clamp.default", "aten.clamp_min.default")
def _clamp(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, ends = values[0], [*values[1:], None][:2]
    names = ["" if end is None else tracer.scalar(end, x) for end in ends]
    return tracer.result(node, tracer.graph.node("Clip", tracer.name(x), *names))


# ---------------------------------------------------------------- layers


@operator("aten.linear.default")
def _linear(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, weight, bias = values[:3]
    y = tracer.graph.node("MatMul", tracer.name(x), tracer.name(weight.t().contiguous()))
    return tracer.result(node, y if bias is None else tracer.graph.node("Add", y, tracer.name(bias)))


@operator("aten.conv2d.default")
def _conv2d(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, weight, bias, stride, padding, dilation, groups = values[:7]
    names = [tracer.name(value) for value in (x, weight, bias) if value is not None]
    sizes = [list(value) * 2 if len(value) == 1 else list(value) for value in (stride, padding, dilation)]
    options: dict[str, Any] = {"strides": sizes[0], "pads": sizes[1] * 2, "dilations": sizes[2], "group": groups}
    return tracer.result(node, tracer.graph.node("Conv", *names, **options))


@operator("aten.layer_norm.default")
def _layer_norm(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, shape, weight, bias, epsilon = values[:5]
    weight = torch.ones(*shape) if weight is None else weight
    names = [tracer.name(value) for value in (x, weight, bias) if value is not None]
    y = tracer.graph.node("LayerNormalization", *names, axis=-len(shape), epsilon=epsilon)
    return tracer.result(node, y)


@operator("aten.batch_norm.default")
def _batch_norm(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, weight, bias, mean, variance, _, _, epsilon = values[:8]
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    names = [tracer.name(value) for value in (x, weight, bias, mean, variance)]
    return tracer.result(node, tracer.graph.node("BatchNormalization", *names, epsilon=epsilon))


@operator("aten.softmax.int", "aten._softmax.default")
def _softmax(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    return tracer.result(node, tracer.graph.node("Softmax", tracer.name(values[0]), axis=values[1]))


@operator("aten.gelu.default")
def _gelu(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    y = tracer.graph.node("Gelu", tracer.name(values[0]), approximate=values[1] or "none")
    return tracer.result(node, y)


@operator("aten.silu.default")
def _silu(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x = tracer.name(values[0])
    return tracer.result(node, tracer.graph.node("Mul", x, tracer.graph.node("Sigmoid", x)))


@operator("aten.rsqrt.default")
def _rsqrt(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    return tracer.result(node, tracer.graph.node("Reciprocal", tracer.graph.node("Sqrt", tracer.name(values[0]))))


@operator("aten.avg_pool2d.default")
def _avg_pool(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, kernel, stride, padding, ceil, counts_padding, divisor = values[:7]
    if divisor is not None:
        raise ConfigError("an average pooling with a divisor of its own is not known to the ONNX export")
    options: dict[str, Any] = {"kernel_shape": kernel, "strides": stride or kernel, "pads": list(padding) * 2}
    options |= {"ceil_mode": int(ceil), "count_include_pad": int(counts_padding)}
    return tracer.result(node, tracer.graph.node("AveragePool", tracer.name(x), **options))


@operator("aten.max_pool2d.default")
def _max_pool(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, kernel, stride, padding, dilation, ceil = values[:6]
    options: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": stride or kernel,
        "pads": list(padding) * 2,
        "dilations": dilation,
    }
    return tracer.result(node, tracer.graph.node("MaxPool", tracer.name(x), ceil_mode=int(ceil), **options))


@operator("aten.adaptive_avg_pool2d.default")
def _global_pool(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    if list(values[1]) != [1, 1]:
        raise ConfigError(f"an average pooling to {values[1]} is not known to the ONNX export")
    return tracer.result(node, tracer.graph.node("GlobalAveragePool", tracer.name(values[0])))


@operator("aten.scaled_dot_product_attention.default")
def _fused_attention(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    """Write out an attention that stayed fused: softmax(scale q k^T + mask) v in float."""
    q, k, v, mask, _, causal, scale = values[:7]
    if causal:
        raise ConfigError("a fused causal attention is not known to the ONNX export; make it explicit or exclude it")
    factor = tracer.scalar(scale if scale is not None else 1 / math.sqrt(_shape(q)[-1]), q)
    graph, rank = tracer.graph, _rank(k)
    keys = graph.node("Transpose", tracer.name(k), perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = graph.node("MatMul", graph.node("Mul", tracer.name(q), factor), keys)
    if mask is not None:
        scores = graph.node("Add", scores, tracer.name(mask))
    weights = graph.node("Softmax", scores, axis=-1)
    return tracer.result(node, graph.node("MatMul", weights, tracer.name(v)))


# ---------------------------------------------------------------- reductions


def _reduction(name: str, onnx: str) -> None:
    def emit(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
        x, axes = values[0], values[1]
        keep = int(bool(values[2])) if len(values) > 2 else 0
        listed = axes if axes else list(range(_rank(x)))
        return tracer.result(node, tracer.graph.node(onnx, tracer.name(x), tracer.ints(*listed), keepdims=keep))

    OPERATORS[name] = emit


_reduction("aten.mean.dim", "ReduceMean")
_reduction("aten.sum.dim_IntList", "ReduceSum")
_reduction("aten.amax.default", "ReduceMax")


@operator("aten.argmax.default")
def _argmax(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, axis, keep = values[:3]
    name = _as(tracer, x, torch.int32) if _dtype(x) == torch.bool else tracer.name(x)
    return tracer.result(node, tracer.graph.node("ArgMax", name, axis=axis, keepdims=int(bool(keep))))


@operator("aten.linalg_vector_norm.default")
def _norm(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, order, axes, keep = values[:4]
    if order != 2:
        raise ConfigError(f"a norm of order {order} is not known to the ONNX export")
    y = tracer.graph.node("ReduceL2", tracer.name(x), tracer.ints(*axes), keepdims=int(bool(keep)))
    return tracer.result(node, y)


# ---------------------------------------------------------------- shapes


@operator("aten.sym_size.int")
def _sym_size(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:  # noqa: ARG001
    return _size_at(tracer, values[0], values[1])


def _size_at(tracer: Tracer, x: Value, axis: int) -> Size:
    axis %= _rank(x)
    return Size(tracer.graph.node("Shape", tracer.name(x), start=axis, end=axis + 1))


@operator(
    "aten.reshape.default", "aten.view.default", "aten.flatten.using_ints", "aten.unflatten.int", "aten.squeeze.dim",
    "aten.squeeze.default", "aten.unsqueeze.default", "aten._unsafe_view.default",
)  # fmt: skip
def _reshape(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, wanted = values[0], list(node.meta["val"].shape)
    before = list(_shape(x))
    free = [i for i, size in enumerate(wanted) if not isinstance(size, int)]
    sizes: list[int | Size] = []
    for i, size in enumerate(wanted):
        if isinstance(size, int):
            sizes.append(size)
        elif len(free) == 1:
            sizes.append(-1)
        elif i < len(before) and str(before[i]) == str(size):
            sizes.append(0)
        else:
            same = [j for j, other in enumerate(before) if str(other) == str(size)]
            sizes.append(_size_at(tracer, x, same[0]) if same else -1)
    return tracer.result(node, tracer.graph.node("Reshape", tracer.name(x), tracer.sizes(sizes)))


@operator("aten.expand.default")
def _expand(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, asked = values[:2]
    before, wanted = list(_shape(x)), list(node.meta["val"].shape)
    before = [1] * (len(wanted) - len(before)) + before
    sizes = [
        value if isinstance(value, Size) else 1 if str(old) == str(new) else int(new)
        for value, old, new in zip(asked, before, wanted, strict=True)
    ]
    return tracer.result(node, tracer.graph.node("Expand", tracer.name(x), tracer.sizes(sizes)))


def _permuted(tracer: Tracer, node: fx.Node, x: Value, order: Sequence[int]) -> Value:
    rank = _rank(x)
    return tracer.result(node, tracer.graph.node("Transpose", tracer.name(x), perm=[axis % rank for axis in order]))


@operator("aten.permute.default")
def _permute(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    return _permuted(tracer, node, *values[:2])


@operator("aten.transpose.int", "aten.t.default")
def _transpose(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, first, second = (values[0], 0, 1) if len(values) < 3 else values[:3]
    order = list(range(_rank(x)))
    order[first], order[second] = order[second], order[first]
    return _permuted(tracer, node, x, order)


@operator("aten.cat.default")
def _cat(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    parts, axis = values[0], values[1] or 0
    return tracer.result(node, tracer.graph.node("Concat", *(tracer.name(part) for part in parts), axis=axis))


@operator("aten.stack.default")
def _stack(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    axis = (values[1] or 0) % len(node.meta["val"].shape)
    parts = [tracer.graph.node("Unsqueeze", tracer.name(part), tracer.ints(axis)) for part in values[0]]
    return tracer.result(node, tracer.graph.node("Concat", *parts, axis=axis))


@operator("aten.slice.Tensor")
def _slice(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, axis, start, end, step = values[:5]
    bounds = [start or 0, _LAST if end is None else end]
    names = [value.name if isinstance(value, Size) else tracer.ints(value) for value in bounds]
    y = tracer.graph.node("Slice", tracer.name(x), *names, tracer.ints(axis or 0), tracer.ints(step or 1))
    return tracer.result(node, y)


@operator("aten.select.int")
def _select(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, axis, index = values[:3]
    stored = tracer.graph.store(torch.tensor(index).numpy(), "index")
    return tracer.result(node, tracer.graph.node("Gather", tracer.name(x), stored, axis=axis))


@operator("aten.unbind.int")
def _unbind(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, axis = values[0], values[1] or 0
    made = []
    for index, part in enumerate(node.meta["val"]):
        stored = tracer.graph.store(torch.tensor(index).numpy(), "index")
        made.append(Ref(tracer.graph.node("Gather", tracer.name(x), stored, axis=axis), part))
    return made


@operator("aten.split_with_sizes.default", "aten.split.Tensor", "aten.split.sizes", "aten.chunk.default")
def _split(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, axis, parts = values[0], values[2] or 0, node.meta["val"]
    sizes = tracer.ints(*(int(part.shape[axis]) for part in parts))
    names = tracer.graph.nodes_of("Split", [tracer.name(x), sizes], len(parts), axis=axis)
    return [Ref(name, part) for name, part in zip(names, parts, strict=True)]


@operator("aten.embedding.default")
def _embedding(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    table, ids = values[:2]
    return tracer.result(node, tracer.graph.node("Gather", tracer.name(table), tracer.name(ids), axis=0))


@operator("aten.zeros_like.default", "aten.ones_like.default")
def _filled_like(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    number = torch.tensor(float("ones" in str(node.target)), dtype=node.meta["val"].dtype)
    size = tracer.graph.node("Shape", tracer.name(values[0]))
    return tracer.result(node, tracer.graph.node("Expand", tracer.graph.store(number.numpy(), "number"), size))


@operator("aten.expand_as.default")
def _expand_as(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    size = tracer.graph.node("Shape", tracer.name(values[1]))
    return tracer.result(node, tracer.graph.node("Expand", tracer.name(values[0]), size))


@operator("aten.gather.default")
def _gather(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, axis, index = values[:3]
    y = tracer.graph.node("GatherElements", tracer.name(x), tracer.name(index), axis=axis)
    return tracer.result(node, y)


@operator("aten.index_select.default")
def _index_select(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, axis, index = values[:3]
    return tracer.result(node, tracer.graph.node("Gather", tracer.name(x), tracer.name(index), axis=axis))


@operator("aten.to.device", "aten.to.dtype_layout", "aten.to.other")
def _to_device(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    return tracer.result(node, _as(tracer, values[0], node.meta["val"].dtype))


@operator("aten.cumsum.default")
def _cumsum(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x = _as(tracer, values[0], node.meta["val"].dtype)
    return tracer.result(
        node, tracer.graph.node("CumSum", x, tracer.graph.store(torch.tensor(values[1]).numpy(), "axis"))
    )


def _filled(name: str, value: float, sizes_at: int) -> None:
    def emit(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
        number = values[2 if "full" in name and "new" in name else 1] if "full" in name else value
        kind = node.meta["val"].dtype
        stored = tracer.graph.store(torch.tensor(number, dtype=kind).numpy(), "number")
        return tracer.result(node, tracer.graph.node("Expand", stored, tracer.sizes(values[sizes_at])))

    OPERATORS[f"aten.{name}.default"] = emit


_filled("new_ones", 1, 1)
_filled("new_zeros", 0, 1)
_filled("new_full", 0, 1)
_filled("ones", 1, 0)
_filled("zeros", 0, 0)
_filled("full", 0, 0)


@operator("aten.arange.default", "aten.arange.start")
def _arange(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    start, end = (0, values[0]) if str(node.target).endswith("default") else values[:2]
    ends = []
    for value in (start, end):
        name = value.name if isinstance(value, Size) else tracer.ints(int(value))
        ends.append(tracer.graph.node("Squeeze", name))
    one = tracer.graph.store(torch.tensor(1).numpy(), "one")
    return tracer.result(node, tracer.graph.node("Range", *ends, one))


@operator("aten.index.Tensor")
def _index(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, indices = values[:2]
    places = [axis for axis, index in enumerate(indices) if index is not None]
    if len(places) == 1:
        index = tracer.name(indices[places[0]])
        return tracer.result(node, tracer.graph.node("Gather", tracer.name(x), index, axis=places[0]))
    if places != list(range(len(places))) or any(_dtype(indices[place]) == torch.bool for place in places):
        raise ConfigError("an indexing by tensors of this form is not known to the ONNX export")
    last, nothing = tracer.ints(-1), tracer.graph.store(torch.tensor(0).numpy(), "nothing")
    names = [_as(tracer, indices[place], torch.int64) for place in places]
    zeros = tracer.graph.node("Mul", names[0], nothing)
    for name in names[1:]:  # of the shape that all of them broadcast to
        zeros = tracer.graph.node("Add", zeros, tracer.graph.node("Mul", name, nothing))
    columns = [tracer.graph.node("Unsqueeze", tracer.graph.node("Add", name, zeros), last) for name in names]
    joint = tracer.graph.node("Concat", *columns, axis=-1)
    return tracer.result(node, tracer.graph.node("GatherND", tracer.name(x), joint))


@operator("aten.roll.default")
def _roll(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, shifts, axes = values[:3]
    name = tracer.name(x)
    for shift, axis in zip(shifts, axes, strict=True):
        cut = -int(shift) % int(_shape(x)[axis])
        head, tail = (
            tracer.graph.node("Slice", name, tracer.ints(a), tracer.ints(b), tracer.ints(axis))
            for a, b in ((0, cut), (cut, _LAST))
        )
        name = tracer.graph.node("Concat", tail, head, axis=axis)
    return tracer.result(node, name)


@operator("aten.pad.default", "aten.constant_pad_nd.default")
def _pad(tracer: Tracer, node: fx.Node, values: Sequence[Value]) -> Value:
    x, pads = values[0], values[1]
    mode, value = (values[2], values[3]) if str(node.target).startswith("aten.pad") else ("constant", values[2])
    if mode != "constant":
        raise ConfigError(f"padding by {mode} is not known to the ONNX export")
    rank = _rank(x)
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    number = tracer.scalar(value or 0, x)
    return tracer.result(node, tracer.graph.node("Pad", tracer.name(x), tracer.ints(*before, *after), number))
