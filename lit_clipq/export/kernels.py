"""Which kernel multiplies each layer, read off the graph that the runtime has optimised."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from lit_clipq.errors import ModelError
from lit_clipq.export.graph import Product

INTEGER = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QLinearConv", "QGemm", "MatMulInteger", "ConvInteger"})
"""Kernels of ONNX Runtime that multiply integers."""
_WEIGHT_ONLY = "MatMulNBits"


@dataclass(frozen=True)
class Kernel:
    """What multiplies one layer."""

    layer: str
    operator: str
    """Of the optimised graph; empty for a table, which multiplies nothing."""
    expected: bool
    """Whether the product was meant to be one of integers."""

    @property
    def is_integer(self) -> bool:
        """Whether integers are multiplied."""
        return self.operator in INTEGER

    @property
    def holds(self) -> bool:
        """Whether the kernel is what was meant."""
        return self.is_integer or not self.expected


def list_kernels(optimised: Path, products: Mapping[str, Product], expected: Mapping[str, bool]) -> list[Kernel]:
    """List the kernel of every layer.

    Args:
        optimised: File that the runtime wrote.
        products: By layer.
        expected: Whether the product of a layer is meant to be one of integers.

    Raises:
        ModelError: If the optimised graph has no node for a layer.
    """
    graph = onnx.load(str(optimised), load_external_data=False).graph
    operators = {node.name: node.op_type for node in graph.node}
    found = []
    for name, product in products.items():
        if not product.core:
            found.append(Kernel(name, "", expected=False))
            continue
        names = [
            n for n in operators if n == product.core or n.startswith((f"{product.core}_token_", f"{product.core}/"))
        ]
        if not names and not expected[name]:
            found.append(Kernel(name, "float", expected=False))  # joined with its neighbours
            continue
        if not names:
            raise ModelError(f"the optimised graph has no node for layer {name}; report this with the model's name")
        kinds = {operators[n] for n in names}
        operator = next((kind for kind in sorted(kinds) if kind in INTEGER or kind == _WEIGHT_ONLY), min(kinds))
        found.append(Kernel(name, operator, expected[name]))
    return found


def check_kernels(kernels: list[Kernel]) -> None:
    """Refuse a graph in which a product that is called quantized is one of floats.

    Raises:
        ModelError: Names the layers.
    """
    wrong = [kernel for kernel in kernels if not kernel.holds]
    if wrong:
        listed = ", ".join(f"{kernel.layer} ({kernel.operator})" for kernel in wrong[:5])
        raise ModelError(
            f"{len(wrong)} of {len(kernels)} products would be computed in float: {listed}; exclude them, "
            "or give --export.fallback float"
        )
