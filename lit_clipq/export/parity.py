"""Whether the exported graph computes what the fake-quantized network does: product by product, and as a whole.

As a whole it cannot be bit-equal: a code that flips by rounding flips others behind it, so that in a deep network the
difference to the fake-quantized one grows to what quantization itself changed. Hence two comparisons: every product by
itself with the same input, and embeddings against the noise of quantization.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_clipq.errors import ModelError
from lit_clipq.export.graph import Graph, Port, Product
from lit_clipq.export.products import Form
from lit_clipq.runtime.session import Session, open_session

PRODUCT_DB = 60.0
"""SQNR that every product reaches with the same input."""
MARGIN_DB = 1.0
"""What SQNR(integer, fake) may lie below SQNR(fake, float)."""
_PERFECT_DB = 200.0
_LARGEST = 4
"""Samples of a batch that products are compared on."""
OpenSession = Callable[[bytes], Session]


@dataclass(frozen=True)
class TowerParity:
    """How far a tower's graph is from the fake-quantized network."""

    products_db: Mapping[str, float]
    """SQNR of every product with the same input."""
    integer_db: float
    """SQNR of embeddings, integer against fake-quantized."""
    fake_db: float
    """SQNR of embeddings, fake-quantized against float."""

    @property
    def worst(self) -> tuple[str, float]:
        """The product that differs most."""
        return min(self.products_db.items(), key=lambda item: item[1], default=("", _PERFECT_DB))

    def check(self, tower: str) -> None:
        """Refuse a graph that computes something else.

        Raises:
            ModelError: Names the worst layer.
        """
        name, worst = self.worst
        if worst < PRODUCT_DB:
            raise ModelError(
                f"parity of the {tower} tower fails: the worst layer {name} reaches {worst:.1f} dB against the "
                f"fake-quantized one with the same input, expected {PRODUCT_DB:.0f}; products may saturate in this "
                "session"
            )
        if self.integer_db < self.fake_db - MARGIN_DB:
            raise ModelError(
                f"parity of the {tower} tower fails: embeddings reach {self.integer_db:.1f} dB against the "
                f"fake-quantized ones, expected {self.fake_db - MARGIN_DB:.1f} (what quantization changes, less "
                f"{MARGIN_DB:.0f}); the worst layer by itself is {name} with {worst:.1f} dB"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values, rounded."""
        name, worst = self.worst
        return {
            "integer_db": round(self.integer_db, 2),
            "fake_db": round(self.fake_db, 2),
            "worst_product": name,
            "worst_product_db": round(worst, 2),
            "products_db": {layer: round(value, 2) for layer, value in self.products_db.items()},
        }


def sqnr(x: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """Return 10 log10(|reference|^2 / |x - reference|^2) in dB, at most 200."""
    noise = np.square(x.astype(np.float64) - reference).sum()
    signal = np.square(reference.astype(np.float64)).sum()
    if not np.isfinite(noise):
        return -_PERFECT_DB
    return float(min(10 * np.log10(signal / noise), _PERFECT_DB)) if noise > 0 and signal > 0 else _PERFECT_DB


def product_model(graph: Graph, product: Product) -> bytes:
    """Return the nodes of one layer, as they are in the whole graph, as a file of their own."""
    is_table = not product.core
    inputs = [
        Port(name, "int64" if is_table else "float32", tuple(n if isinstance(n, int) else None for n in shape))
        for name, shape in zip(product.inputs, product.shapes, strict=True)
    ]
    free = [Port(port.name, port.dtype, (None, *port.shape[1:])) for port in inputs]
    output = Port(product.output, "float32", (None,) * _rank(product))
    model = graph.model(free, [output], product.nodes)
    return bytes(model.SerializeToString())


def compare_products(
    tower: nn.Module,
    sample: Tensor,
    graph: Graph,
    forms: Mapping[str, Form],
    open_: OpenSession = open_session,
) -> dict[str, float]:
    """Run a tower of the fake-quantized network and each of its layers in a session, with the same inputs.

    Args:
        tower: Of the fake-quantized network.
        sample: Input of the tower.
        graph: The exported one.
        forms: Of its layers, by name.
        open_: Makes the session of a layer's file.

    Returns:
        SQNR in dB by layer.
    """
    found: dict[str, float] = {}
    hooks = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def compare(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            product = graph.products[name]
            session = open_(product_model(graph, product))
            arrays = {n: np.ascontiguousarray(x.numpy()) for n, x in zip(product.inputs, inputs, strict=True)}
            found[name] = sqnr(session.run(None, arrays)[0], output.numpy())

        return compare

    try:
        hooks = [forms[name].layer.register_forward_hook(hook(name)) for name in graph.products]
        with torch.no_grad():
            tower(sample[:_LARGEST])
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _rank(product: Product) -> int:
    shape = product.shapes[0]
    return len(shape) if product.core else len(shape) + 1
