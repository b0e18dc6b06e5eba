"""An ONNX graph under construction: nodes, stored arrays, and which nodes belong to which layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
"""The first with 4-bit tensors and blocks in QuantizeLinear."""
IR_VERSION = 10
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
Array = np.ndarray[Any, Any]


@dataclass
class Product:
    """The nodes that compute one layer.

    Args:
        name: Of the layer.
    """

    name: str
    inputs: tuple[str, ...] = ()
    """Names of the float tensors that go in (token ids for a table)."""
    shapes: tuple[Sequence[Any], ...] = ()
    """Shapes of these; a size that is free is no int."""
    meets_grid: bool = False
    """Whether nothing but a relu lies between the output and the one grid of 256 codes that reads it."""
    output: str = ""
    """Name of the float tensor that comes out."""
    core: str = ""
    """Name of the node that multiplies; empty for a table."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)


class Graph:
    """Nodes in order, with unique names; what a layer emits is kept apart as a `Product` as well."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}
        self.products: dict[str, Product] = {}
        self._names: set[str] = set()
        self._layer: Product | None = None

    def unique(self, wish: str) -> str:
        """Return `wish`, or `wish` with a number where it is taken."""
        name, number = wish, 1
        while name in self._names:
            name, number = f"{wish}_{number}", number + 1
        self._names.add(name)
        return name

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node of one output; returns the output's name."""
        return self.nodes_of(operator, inputs, 1, name=name, **attributes)[0]

    def nodes_of(
        self, operator: str, inputs: Sequence[str], outputs: int, *, name: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node of several outputs; returns their names."""
        prefix = f"{self._layer.name}/" if self._layer is not None else ""
        label = self.unique(name or f"{prefix}{operator}")
        made = [self.unique(f"{label}:{i}" if outputs > 1 else f"{label}:out") for i in range(outputs)]
        node = helper.make_node(operator, list(inputs), made, name=label, **attributes)
        self.nodes.append(node)
        if self._layer is not None:
            self._layer.nodes.append(node)
        return made

    def store(self, array: Array, wish: str = "constant") -> str:
        """Keep an array in the file; returns its name. Equal arrays are kept apart on purpose.

        A runtime that rewrites the weight of one product must not change that of another.
        """
        prefix = f"{self._layer.name}/" if self._layer is not None else ""
        name = self.unique(prefix + wish)
        self.stored[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def store_int4(self, codes: Array, wish: str) -> str:
        """Keep int8 codes -8 .. 7 in half a byte each, the first in the low half; returns the name."""
        prefix = f"{self._layer.name}/" if self._layer is not None else ""
        name = self.unique(prefix + wish)
        flat = codes.reshape(-1).astype(np.uint8) & 0xF
        flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
        packed = (flat[::2] | (flat[1::2] << 4)).tobytes()
        self.stored[name] = helper.make_tensor(name, TensorProto.INT4, codes.shape, packed, raw=True)
        return name

    @contextmanager
    def layer(
        self, name: str, inputs: Sequence[str], shapes: Sequence[Sequence[Any]], *, meets_grid: bool = False
    ) -> Iterator[Product]:
        """Collect what is added as the nodes of a layer; the caller sets the product's output and core.

        Raises:
            ValueError: If the layer was there already: a layer that is called twice would share its stored weight.
        """
        if name in self.products:
            raise ValueError(f"layer {name} is called twice in one forward")
        self._layer = Product(name, tuple(inputs), tuple(shapes), meets_grid)
        try:
            yield self._layer
        finally:
            product, self._layer = self._layer, None
        self.products[name] = product

    def model(
        self, inputs: Sequence["Port"], outputs: Sequence["Port"], nodes: Sequence[onnx.NodeProto] | None = None
    ) -> onnx.ModelProto:
        """Make the file of all nodes, or of some, with the arrays they read."""
        chosen = self.nodes if nodes is None else nodes
        read = {name for node in chosen for name in node.input}
        graph = helper.make_graph(
            list(chosen),
            "lit_clipq",
            [port.proto() for port in inputs],
            [port.proto() for port in outputs],
            [tensor for name, tensor in self.stored.items() if name in read],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="lit_clipq")
        model.ir_version = IR_VERSION
        return model


@dataclass(frozen=True)
class Port:
    """An input or output of a file."""

    name: str
    dtype: str
    """`float32` or `int64`."""
    shape: tuple[int | str | None, ...]
    """Sizes; a name or `None` where it is free."""

    def proto(self) -> onnx.ValueInfoProto:
        """Return it as ONNX writes it."""
        return helper.make_tensor_value_info(self.name, _TYPES[self.dtype], self.shape)
