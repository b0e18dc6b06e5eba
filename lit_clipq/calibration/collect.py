"""Collect, for every Q-module, its operands and the squared gradient of the loss by its output.

One forward and one backward pass serve all layers at once. Products are flattened to *units* along the first axis: rows
of a linear layer, pictures of a convolution, (sample, head) pairs of an attention product. Each unit has a key made of
global sample number and place, the same on every rank, so that samples of the data do not depend on how it was sharded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_clipq.errors import CalibrationError
from lit_clipq.functional.granularity import PerTensor, extrema
from lit_clipq.nn.modules import QConv2d, QLinear, QMatMul, QModule

_PLACES = 2**24  # more than a sample has units


@dataclass
class Observations:
    """What one Q-module saw of one batch.

    Attributes:
        inputs: Operands with units first: (N, in) of a linear layer, (B, C, H, W) of a convolution, (P, M, K) and
            (P, K, N) of a matrix product.
        keys: Global number of each unit, int64.
        weight: Squared output gradients, shape of the product; `None` where none were collected.
        target: What the product should be, if not the float product of `inputs`.
        ranges: Minimum and maximum of each operand (operands, 2), where units were left out that count for them.
    """

    inputs: tuple[Tensor, ...]
    keys: Tensor
    weight: Tensor | None = None
    target: Tensor | None = None
    ranges: Tensor | None = None

    def select(self, chosen: Tensor | slice) -> "Observations":
        """Return the units in a slice, or where a boolean (N,) holds."""
        return Observations(
            tuple(x[chosen] for x in self.inputs),
            self.keys[chosen],
            None if self.weight is None else self.weight[chosen],
            None if self.target is None else self.target[chosen],
            self.ranges,
        )

    def range_of(self, operand: int) -> Tensor:
        """Return minimum and maximum of an operand, float32 (2,)."""
        if self.ranges is not None:
            return self.ranges[operand]
        return torch.stack(extrema(self.inputs[operand].float(), PerTensor()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = (*self.inputs, self.weight, self.target, self.keys)
        return sum(x.numel() * x.element_size() for x in held if x is not None)


@dataclass
class Rows:
    """Which rows of the batch at hand count.

    Attributes:
        samples: Global sample numbers of the batch, int64 (B,).
        lengths: Valid positions of each text, int64 (B,), where the text tower is causal and pooled at its end token;
            `None` elsewhere. Positions behind the end never reach the output.
        drop_start: Whether the first position is left out as well, because its keys and values are constants.
        sizes: How many pictures, texts and so on the batch has, where they are not all `len(samples)`.
    """

    samples: Tensor
    lengths: Tensor | None = None
    drop_start: bool = False
    sizes: tuple[int, ...] = ()


@dataclass
class Recorder:
    """Hooks on Q-modules that keep what they see; use `recording`.

    Squared gradients of several backward passes through one forward pass add up.

    Attributes:
        dtype: Type to store in; `None` is that of the values.
        gradients: Whether squared output gradients are kept.
        rows: Which rows of the next batch count; set it before each forward pass.
        seen: What each layer saw, one entry a call.
        text: Names of the layers whose rows are positions of a text.
        averages: Names of the products of attention weights and values.
        token_share: Share of the rows of linear layers that is kept, drawn by their keys.
    """

    dtype: torch.dtype | None
    gradients: bool
    rows: Rows = field(default_factory=lambda: Rows(torch.zeros(0, dtype=torch.int64)))
    seen: dict[str, list[Observations]] = field(default_factory=dict)
    text: frozenset[str] = frozenset()
    averages: frozenset[str] = frozenset()
    token_share: float = 1.0
    _open: list["_Open"] = field(default_factory=list)

    def watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        """Return the forward hook of layer `name`."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            unit = _Units(module, self.rows, name in self.text, name in self.averages)
            operands, keys = unit.operands(inputs), unit.keys(output)
            ranges = None
            if self.token_share < 1 and isinstance(module, QLinear) and len(keys):
                ranges = torch.stack([torch.stack(extrema(x.detach().float(), PerTensor())) for x in operands])
                unit.drawn = hashed(keys).double() / 2**31 < self.token_share
                operands, keys = tuple(x[unit.drawn] for x in operands), keys[unit.drawn]
            record = Observations(tuple(self._store(x) for x in operands), keys, ranges=ranges)
            self.seen.setdefault(name, []).append(record)
            zeros = output.detach().new_zeros(()).expand(output.shape)
            self._open.append(_Open(name, record, tuple(x._version for x in record.inputs), unit, zeros))
            if not self.gradients:
                return None
            # A clone, because what follows may work in place (ReLU), and a leaf must not be changed.
            tracked = output if output.requires_grad else output.detach().requires_grad_().clone()

            def keep(gradient: Tensor) -> None:
                square = self._store(unit.product(gradient.detach()).square())
                record.weight = square if record.weight is None else record.weight.add_(square)

            tracked.register_hook(keep)
            return tracked

        return hook

    def finish_batch(self) -> None:
        """End a batch, after its backward pass: calls whose output got no gradient get zeros.

        Raises:
            CalibrationError: If an operand was changed in place after its layer had read it.
        """
        for call in self._open:
            record = call.record
            if tuple(x._version for x in record.inputs) != call.versions:
                raise CalibrationError(
                    f"the input of layer {call.name} was changed in place after the layer had read it, so what was "
                    "kept of it is wrong; write that operation out of place or exclude the layer"
                )
            if self.gradients and record.weight is None:
                record.weight = self._store(call.unit.product(call.zeros).contiguous())
        self._open.clear()

    def _store(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype) if self.dtype is not None else x.detach()


@dataclass
class _Open:
    """A call of the batch at hand: its record, and what is needed to check and complete it."""

    name: str
    record: Observations
    versions: tuple[int, ...]
    unit: "_Units"
    zeros: Tensor


@contextmanager
def recording(
    modules: Mapping[str, QModule],
    *,
    text: frozenset[str] = frozenset(),
    averages: frozenset[str] = frozenset(),
    gradients: bool = True,
    dtype: torch.dtype | None = None,
    token_share: float = 1.0,
) -> Iterator[Recorder]:
    """Record the given layers while the context is open; the hooks are removed however it ends.

    Args:
        modules: Layers by name.
        text: Names of those whose rows are positions of a text under the end-token rule.
        averages: Names of the products of attention weights and values.
        gradients: Whether a backward pass follows; then the outputs are made to track gradients although no parameter
            does.
        dtype: Type to store in, for example bfloat16; by default that of the values.
        token_share: Share of the rows of linear layers that is kept; their ranges still count all.
    """
    recorder = Recorder(dtype, gradients, text=text, averages=averages, token_share=token_share)
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(recorder.watch(name)).remove)
        yield recorder


@contextmanager
def without_parameter_gradients(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Let no parameter of the networks track gradients while the context is open; restore what was, however it ends.

    A backward pass then computes gradients of activations only, and `.grad` of the parameters stays as it is.
    """
    tracking = [parameter for root in roots for parameter in root.parameters() if parameter.requires_grad]
    try:
        for parameter in tracking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in tracking:
            parameter.requires_grad_(True)


def valid_operands(module: nn.Module, inputs: tuple[Tensor, ...], rows: Rows, *, averages: bool) -> tuple[Tensor, ...]:
    """Return the operands of one call in the text tower without what lies behind the end of a text.

    Args:
        module: The layer that is called, a Q-module or a float linear layer.
        inputs: Its inputs.
        rows: Lengths of the texts of the batch; without them everything is valid.
        averages: Whether the module is the product of attention weights and values.
    """
    return _Units(module, rows, text=True, averages=averages).operands(inputs) if rows.lengths is not None else inputs


@dataclass
class _Units:
    """How the tensors of one call are cut into units, which of them are valid, and which of its rows are kept."""

    module: nn.Module
    rows: Rows
    text: bool
    averages: bool
    drawn: Tensor | None = None

    def operands(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if isinstance(self.module, QMatMul):
            a, b = inputs
            if self._masked(a):
                a, b = self._text_operands(a, b)
            lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            return tuple(x.expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
        (x,) = inputs
        return (x if isinstance(self.module, QConv2d) else self._linear_rows(x),)

    def product(self, gradient: Tensor) -> Tensor:
        """Cut the gradient of the output as the output of the cut operands is shaped."""
        if isinstance(self.module, QMatMul):
            if self._masked(gradient) and self.rows.drop_start and not self.averages:
                gradient = gradient[..., 1:]  # scores: the column of the start token is exact
            return gradient.reshape(-1, *gradient.shape[-2:])
        if isinstance(self.module, QConv2d):
            return gradient
        rows = self._linear_rows(gradient)
        return rows if self.drawn is None else rows[self.drawn]

    def keys(self, output: Tensor) -> Tensor:
        """Number the units of the output: sample number times a constant, plus the place within the sample."""
        if isinstance(self.module, QConv2d):
            lead = output.shape[:1]
        else:
            lead = output.shape[: -2 if isinstance(self.module, QMatMul) else -1]
        keys = _numbered(lead, self.rows, output.device)
        if not isinstance(self.module, QMatMul | QConv2d) and self._masked(output):
            keys = keys[self._valid(output)]
        return keys.reshape(-1)

    def _linear_rows(self, x: Tensor) -> Tensor:
        if self._masked(x):
            return x[self._valid(x)]
        return x.reshape(-1, x.shape[-1])

    def _masked(self, x: Tensor) -> bool:
        lengths = self.rows.lengths
        return self.text and lengths is not None and x.dim() >= 3 and len(x) == len(lengths)

    def _valid(self, x: Tensor) -> Tensor:
        """Return the boolean (B, L) of positions that count, for x of shape (B, L, ...)."""
        lengths = self.rows.lengths
        assert lengths is not None  # noqa: S101 - `_masked` asked
        positions = torch.arange(x.shape[1], device=x.device)
        valid = positions < lengths.to(x.device)[:, None]
        if self.rows.drop_start:
            valid = valid & (positions > 0)
        return valid

    def _text_operands(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Zero what lies behind the end of a text and cut the start token out of keys or values.

        Scores: a = queries (B, H, L, d), b = keys (B, H, d, L). Averages: a = weights (B, H, L, L), b = values
        (B, H, L, d). Rows of invalid queries are zeroed, not cut, because texts differ in length; their gradient is 0.
        """
        valid = self._valid(a.transpose(1, 2))[:, None, :, None]
        a = a * valid
        if self.averages:
            b = b * valid
            return (a[..., 1:], b[..., 1:, :]) if self.rows.drop_start else (a, b)
        b = b * valid.transpose(-2, -1)
        return (a, b[..., 1:]) if self.rows.drop_start else (a, b)


def hashed(keys: Tensor) -> Tensor:
    """Mix the bits of int64 keys to 0 .. 2^31 - 1; neighbours become unrelated."""
    mixed = (keys * 0x9E3779B1) & 0x7FFFFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    return (mixed ^ (mixed >> 16)) & 0x7FFFFFFF


def _numbered(lead: torch.Size, rows: Rows, device: torch.device) -> Tensor:
    """Return a key for each unit of the leading shape, int64, of that shape.

    The samples are the first axis that is as long as a part of the batch (pictures, texts), else axis 0 where it is a
    multiple of that (windows or heads beside samples). Units of a layer that sees no samples (a table of positions) are
    numbered by place alone.
    """
    sizes = rows.sizes or (len(rows.samples),)
    found = next(((axis, length) for axis, length in enumerate(lead) if length in sizes), None)
    axis, size = found or (0, next((size for size in sizes if size and lead[:1].numel() % size == 0), 0))
    if not size:
        return torch.arange(lead.numel(), device=device).reshape(lead)
    shape = (lead[:axis].numel(), size, lead[axis : axis + 1].numel() // size, lead[axis + 1 :].numel())
    samples = rows.samples[:size].to(device).view(1, size, 1, 1)
    place = torch.arange(shape[0] * shape[2] * shape[3], device=device).view(shape[0], 1, *shape[2:])
    return (samples * _PLACES + place).reshape(lead)
