"""Follow a tower's forward once and rebuild it as an ONNX graph, quantized layers by their forms."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lit_clipq.errors import ConfigError
from lit_clipq.export.graph import Graph, Port
from lit_clipq.export.products import Form
from lit_clipq.nn.integer import Affine
from lit_clipq.nn.modules import QModule

_FORMS: dict[str, Form] = {}
"""Of the layers of the trace in progress."""


@torch.library.custom_op("lit_clipq::layer", mutates_args=())
def _layer(inputs: list[Tensor], name: str) -> Tensor:
    """Stand for a quantized layer in a trace."""
    return _FORMS[name].shape(*inputs).clone()


@_layer.register_fake
def _layer_shape(inputs: list[Tensor], name: str) -> Tensor:
    return _FORMS[name].shape(*inputs)


@dataclass(frozen=True)
class Size:
    """A size that is known when the graph runs: the name of an int64 tensor of shape (1,)."""

    name: str


@dataclass(frozen=True)
class Ref:
    """A tensor that is computed when the graph runs."""

    name: str
    value: Tensor
    """Fake: its type and shape, which may hold free sizes."""


Free = tuple[str, int | None]
"""Name of an axis of any size, and the largest size that is traced."""
Value = Any
"""`Ref`, `Size`, a constant tensor, or a plain value."""
Emit = Callable[["Tracer", fx.Node, Sequence[Value]], Value]
OPERATORS: dict[str, Emit] = {}
"""By name, such as `aten.add.Tensor`; see `lit_clipq.export.operators`."""


class Tracer:
    """Rebuilds a traced forward.

    Args:
        forms: Of the quantized layers that the forward calls, by name.
    """

    def __init__(self, forms: Mapping[str, Form]) -> None:
        self.graph = Graph()
        self.forms = forms
        self._constants: dict[int, tuple[Tensor, str]] = {}

    def run(
        self, tower: nn.Module, example: Tensor, port: str, free: Mapping[int, Free], output: str
    ) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """Trace a tower of one input and one output into the graph.

        Args:
            tower: What is traced, in eval mode.
            example: An input.
            port: What the input is called.
            free: Axes of it that may have any size: the axis' name, and the largest size that is traced.
            output: What the output is called.

        Returns:
            Inputs and outputs of the file.
        """
        traced = _traced(tower, example, free, self.forms)
        values = self._arguments(traced, port)
        for node in traced.graph.nodes:
            if node.op == "call_function":
                values[node] = self._call(node, values)
            elif node.op == "output":
                (result,) = node.args[0]
                self.graph.nodes_of("Identity", [self.name(values[result])], 1, name=output)
        self.graph.nodes[-1].output[0] = output
        shape = tuple(free[axis][0] if axis in free else size for axis, size in enumerate(example.shape))
        dtype = "int64" if example.dtype == torch.int64 else "float32"
        outputs = tuple(free[0][0] if axis == 0 else int(n) for axis, n in enumerate(values[result].value.shape))
        return (Port(port, dtype, shape),), (Port(output, "float32", outputs),)

    def name(self, value: Value) -> str:
        """Return the name of a tensor in the graph; a constant is stored the first time."""
        if isinstance(value, Ref | Size):
            return value.name
        if not isinstance(value, Tensor):
            raise TypeError(f"expected a tensor, got {value!r}")
        held = self._constants.get(id(value))
        if held is None:
            held = value, self.graph.store(value.detach().cpu().numpy(), "constant")
            self._constants[id(value)] = held
        return held[1]

    def scalar(self, value: float, like: Value) -> str:
        """Store a number in the type of a tensor."""
        kind = like.value.dtype if isinstance(like, Ref) else like.dtype
        return self.graph.store(torch.tensor(value, dtype=kind).numpy(), "number")

    def ints(self, *values: int) -> str:
        """Store whole numbers, int64 (n,)."""
        return self.graph.store(np.array(values, dtype=np.int64), "numbers")

    def sizes(self, values: Sequence[int | Size]) -> str:
        """Return the name of an int64 tensor (n,) of numbers and free sizes."""
        if all(isinstance(value, int) for value in values):
            return self.ints(*values)  # type: ignore[arg-type]
        parts = [value.name if isinstance(value, Size) else self.ints(value) for value in values]
        return self.graph.node("Concat", *parts, axis=0)

    def result(self, node: fx.Node, name: str) -> Ref:
        """Name the result of a traced call."""
        return Ref(name, node.meta["val"])

    def _arguments(self, traced: torch.export.ExportedProgram, port: str) -> dict[fx.Node, Value]:
        signature = traced.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        values: dict[fx.Node, Value] = {}
        for node in traced.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in stored:
                name = stored[node.name]
                values[node] = traced.state_dict[name] if name in traced.state_dict else traced.constants[name]
            elif node.name in lifted:
                values[node] = traced.constants[lifted[node.name]]
            else:
                values[node] = Ref(port, node.meta["val"])
        return values

    def _call(self, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
        target = str(node.target)
        arguments: Any = fx.node.map_arg(node.args, lambda n: values[n])
        options: Any = fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.target is operator.getitem:
            return arguments[0][arguments[1]]
        if target == "lit_clipq.layer.default":
            return self._layer(node, *arguments)
        runs = _mentions(arguments) or _mentions(tuple(options.values()))
        if not runs and callable(node.target):
            with torch.no_grad():
                return node.target(*arguments, **options)
        base = OPERATORS.get(target) or OPERATORS.get(target.replace("_.", ".", 1))
        if base is None:
            raise ConfigError(
                f"the operator {target} is not known to the ONNX export; exclude the tower, or add the operator to "
                "lit_clipq.export.operators"
            )
        result = base(self, node, _with_options(node, arguments, options))
        if target.split(".")[-2].endswith("_") and isinstance(node.args[0], fx.Node):
            values[node.args[0]] = result  # in place: whoever reads it from here on reads the result
        return result

    def _layer(self, node: fx.Node, inputs: Sequence[Value], name: str) -> Value:
        names = [self.name(value) for value in inputs]
        shapes = [(value.value if isinstance(value, Ref) else value).shape for value in inputs]
        with self.graph.layer(name, names, shapes, meets_grid=self._meets_grid(node)) as product:
            product.output = self.forms[name].emit(self.graph, product, *names)
        return self.result(node, product.output)

    def _meets_grid(self, node: fx.Node) -> bool:
        """See `Product.meets_grid`."""
        if len(node.users) != 1:
            return False
        (reader,) = node.users
        if str(reader.target) in ("aten.relu.default", "aten.relu_.default"):
            return self._meets_grid(reader)
        if str(reader.target) != "lit_clipq.layer.default":
            return False
        inputs: Any = reader.args[0]
        form, place = self.forms[str(reader.args[1])], list(inputs).index(node)
        grid = form.grid(form.layer.operands[place]) if form.layer.operands else None
        return isinstance(grid, Affine) and grid.qmax - grid.qmin == 255


def _traced(
    tower: nn.Module, example: Tensor, free: Mapping[int, Free], forms: Mapping[str, Form]
) -> torch.export.ExportedProgram:
    axes = {axis: torch.export.Dim(name, max=most) for axis, (name, most) in free.items()}
    with torch.no_grad(), _standing_for(forms):
        return torch.export.export(tower, (example,), dynamic_shapes=({**axes},), strict=False)


@contextmanager
def _standing_for(forms: Mapping[str, Form]) -> Iterator[None]:
    """Let quantized layers be single operators while the context is open."""

    def stand(layer: QModule, name: str) -> None:
        def forward(*inputs: Tensor) -> Tensor:
            return _layer(list(inputs), name)

        layer.forward = forward  # type: ignore[method-assign]

    _FORMS.update(forms)
    try:
        for name, form in forms.items():
            stand(form.layer, name)
        yield
    finally:
        for form in forms.values():
            form.layer.__dict__.pop("forward", None)
        _FORMS.clear()


def _mentions(values: Any) -> bool:
    """Whether a nested list of arguments holds anything that is computed when the graph runs."""
    if isinstance(values, list | tuple):
        return any(_mentions(value) for value in values)
    return isinstance(values, Ref | Size)


def _with_options(node: fx.Node, arguments: Sequence[Value], options: Mapping[str, Value]) -> list[Value]:
    """Return positional and keyword arguments in the order of the operator's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return list(arguments)
    filled = list(arguments)
    for argument in schema.arguments[len(filled) :]:
        filled.append(options.get(argument.name, argument.default_value if argument.has_default_value() else None))
    return filled
