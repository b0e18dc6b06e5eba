"""Collect, for every layer, its operands and the squared gradient of the loss by its output.

One forward and one backward pass serve all layers at once. Products are cut into units (`lit_clipq.nn.layout`); each
has a key made of global sample number and place, the same on every rank, so that samples of the data do not depend on
how it was sharded.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.batches import hashed, unit_keys
from lit_clipq.calibration.observations import Observations
from lit_clipq.calibration.passes import Observer
from lit_clipq.errors import CalibrationError
from lit_clipq.nn.layout import Layout, TextMask


@dataclass(frozen=True)
class Watched:
    """A layer to record."""

    module: nn.Module
    layout: Layout
    text: bool = False
    """Whether its rows are positions of a text under the end-token rule."""
    averages: bool = False
    """Whether it is the product of attention weights and values."""


@dataclass
class _Call:
    """A call of a layer in the batch at hand."""

    name: str
    layout: Layout
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    keys: Tensor
    mask: TextMask | None
    drawn: Tensor | None
    extremes: tuple[Tensor, ...] | None
    zeros: Tensor
    weight: Tensor | None = None

    def product(self, x: Tensor) -> Tensor:
        """Cut an output, or a gradient by it."""
        rows = self.layout.product(x, self.mask)
        return rows if self.drawn is None else rows[self.drawn]


@dataclass
class Recorder(Observer):
    """Hooks on layers that keep what they see. Squared gradients of several backward passes through one forward add up.

    Attributes:
        layers: What to record, by name.
        gradients: Whether squared output gradients are kept; outputs are then made to track gradients although no
            parameter does.
        dtype: Type to store in; `None` is that of the values.
        token_share: Share of the rows of linear layers that is kept, drawn by their keys; their ranges still count all.
        seen: What each layer saw, one entry a call.
    """

    layers: Mapping[str, Watched]
    gradients: bool = True
    dtype: torch.dtype | None = None
    token_share: float = 1.0
    seen: dict[str, list[Observations]] = field(default_factory=dict)
    _open: list[_Call] = field(default_factory=list)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook every layer."""
        for name, watched in self.layers.items():
            yield watched.module.register_forward_hook(self._watch(name, watched))

    def _watch(self, name: str, watched: Watched) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            mask = self.rows.mask(text=watched.text, averages=watched.averages)
            call = self._call(name, watched.layout, inputs, output, mask)
            self._open.append(call)
            if not self.gradients:
                return None
            # A clone, because what follows may work in place (ReLU), and a leaf must not be changed.
            tracked = output if output.requires_grad else output.detach().requires_grad_().clone()

            def keep(gradient: Tensor) -> None:
                square = self._store(call.product(gradient.detach()).square())
                call.weight = square if call.weight is None else call.weight.add_(square)

            tracked.register_hook(keep)
            return tracked

        return hook

    def _call(
        self, name: str, layout: Layout, inputs: tuple[Tensor, ...], output: Tensor, mask: TextMask | None
    ) -> _Call:
        operands, keys = layout.operands(inputs, mask), unit_keys(layout, output, self.rows, mask)
        extremes = drawn = None
        if self.token_share < 1 and layout.by_token and len(keys):
            extremes = tuple(torch.stack(x.detach().float().aminmax(dim=0)) for x in operands)
            drawn = hashed(keys).double() / 2**31 < self.token_share
            operands, keys = tuple(x[drawn] for x in operands), keys[drawn]
        stored = tuple(self._store(x) for x in operands)
        zeros = output.detach().new_zeros(()).expand(output.shape)
        return _Call(name, layout, stored, tuple(x._version for x in stored), keys, mask, drawn, extremes, zeros)

    def end(self, outputs: Any) -> None:  # noqa: ARG002
        """End a batch, after its backward pass: calls whose output got no gradient get zeros.

        Raises:
            CalibrationError: If an operand was changed in place after its layer had read it.
        """
        for call in self._open:
            if tuple(x._version for x in call.inputs) != call.versions:
                raise CalibrationError(
                    f"the input of layer {call.name} was changed in place after the layer had read it, so what was "
                    "kept of it is wrong; write that operation out of place or exclude the layer"
                )
            weight = call.weight
            if self.gradients and weight is None:
                weight = self._store(call.product(call.zeros).contiguous())
            record = Observations(call.layout, call.inputs, call.keys, weight, extremes=call.extremes)
            self.seen.setdefault(call.name, []).append(record)
        self._open.clear()

    def _store(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype) if self.dtype is not None else x.detach()
