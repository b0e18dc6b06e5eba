"""Equalise the channels that layers read, by powers of two that leave the float network the same to the bit.

Dividing channel j by r_j where it is made, and multiplying it by r_j in the weights that read it, leaves the function
as it is: `y = (x / r) (r W)^T`. It moves range from an activation, whose channels share one grid, into the weights, as
SmoothQuant does (arXiv 2211.10438). With powers of two nothing is rounded, so that running the network tells whether a
channel may be scaled: the outputs of calibration must stay the same to the bit.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lit_clipq.calibration.collect import Rows, valid_operands
from lit_clipq.calibration.engine import Calibration, one_of_each_kind
from lit_clipq.calibration.objective import named_outputs
from lit_clipq.distributed import gather
from lit_clipq.functional.granularity import PerChannel, extrema
from lit_clipq.nn.attention import ExplicitAttention
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.nn.swap import FLOAT_BITS
from lit_clipq.recipes.text import measuring_texts

log = logging.getLogger(__name__)

_SHARES = torch.linspace(0, 1, 9, dtype=torch.float64)
_ROWS = 256  # of a weight, at least, that stand for all
_LARGEST_EXPONENT = 12  # far from the ends of float32


@dataclass(frozen=True)
class Channels:
    """What the calibration set shows of the rows (N, channels) that a layer reads, by channel, float64 on the CPU."""

    low: Tensor
    """Minimum."""
    high: Tensor
    """Maximum."""
    squares: Tensor
    """Sum of squares."""
    rows: int
    """How many rows there are."""

    @classmethod
    def of(cls, x: Tensor) -> "Channels":
        """Look at rows (N, channels); there must be some."""
        low, high = torch.aminmax(x, dim=0)
        return cls(low.double().cpu(), high.double().cpu(), x.square().sum(0, dtype=torch.float64).cpu(), len(x))

    def __add__(self, other: "Channels") -> "Channels":
        """Join what was seen of other rows."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Channels(low, high, self.squares + other.squares, self.rows + other.rows)


@dataclass(frozen=True)
class Link:
    """Channels that one module of a block makes and linear layers of the block read."""

    maker: str
    """Name of a LayerNorm, or of the projection to an attention's values."""
    first: int
    """Row of its parameters that makes the first channel."""
    readers: tuple[str, ...]
    """Names of the layers."""


@torch.no_grad()
def equalize(
    calibration: Calibration, *, end_token: bool, drop_start: bool, per_channel: bool = True
) -> dict[str, float]:
    """Equalise, in place, the channels behind the LayerNorms and within the attentions of every block.

    Of a channel with magnitude m_j over the calibration set and largest weight w_j, r_j is `m_j^a / w_j^(1 - a)` over
    its median, rounded to a power of two from 2^-12 to 2^12. Of nine a between 0 and 1, and of no scaling at all, the
    one with the least `expected_error` of the readers is taken. A LayerNorm whose reader is no member of the same list
    of modules is left alone: what stands between blocks or ends a tower is read by tasks, too. So are values that an
    attention hands on to a cache, and all values where the channels of a weight share a scale.

    Where the outputs change, something else reads the channels; halves are then tried by themselves, with a run of one
    batch each, until those that can stay are found. `calibration.undo` takes everything back.

    Args:
        calibration: Networks in float, before their layers are swapped.
        end_token: Whether positions behind a text's end are left out.
        drop_start: Whether the first position of texts is left out.
        per_channel: Whether each row of a weight gets a scale of its own.

    Returns:
        By the name of what makes the channels: expected error over that without scaling.
    """
    before, links, channels = _look(calibration, end_token, drop_start, values=per_channel)
    modules, widths = _modules(calibration), {entry.name: entry for entry in calibration.plan.quantized}
    chosen: dict[Link, tuple[Tensor, float]] = {}
    for link in links:
        readers = [(modules[name].get_parameter("weight"), channels[name]) for name in link.readers]
        offers = _offers(*readers)
        errors = torch.zeros(len(offers), dtype=torch.float64)
        for name, reader in zip(link.readers, readers, strict=True):
            if name in widths:
                bits = widths[name].weight_bits or FLOAT_BITS, widths[name].activation_bits
                errors += expected_error(*reader, *bits, offers, per_channel=per_channel)
        best = int(errors.argmin())
        if best:
            chosen[link] = offers[best], float(errors[best] / errors[0])
    chosen = gather(chosen)[0]  # the same on every rank, to the bit
    kept = _scale(calibration, [(link, factors) for link, (factors, _) in chosen.items()], before)
    if len(kept) < len(chosen):
        left = [link.maker for link in chosen if link not in kept]
        log.warning(
            "the channels that %s makes stay as they are, as something else reads them (%d of %d)",
            left[0],
            len(left),
            len(chosen),
        )
    return {link.maker: chosen[link][1] for link in kept}


def expected_error(
    weight: Tensor,
    seen: Channels,
    weight_bits: int,
    activation_bits: int,
    factors: Tensor,
    *,
    per_channel: bool = True,
) -> Tensor:
    """Predict the squared error of a layer's output from min-max grids, of rows on average.

    Errors of channels are taken as independent of each other. That of an input with step S is noise of variance
    `n(x) = min(E[x^2], S^2 / 12)`, as values far below the step become 0; that of a weight is computed:
    `sum_oj n(x_j / r_j) (r_j W_oj)^2 + (Q(r_j W_oj) - r_j W_oj)^2 E[x_j^2] / r_j^2`.

    Args:
        weight: Shape (out, channels).
        seen: What the layer reads.
        weight_bits: Width of the weight, with symmetric grids; 32 is float.
        activation_bits: Width of the input, with one affine grid; 32 is float.
        factors: Shape (K, channels), float64 on the CPU: by what channels are divided.
        per_channel: Whether each row of the weight has a grid of its own; else one serves all.

    Returns:
        Shape (K,), float64 on the CPU.

    Example:
        >>> factors = torch.tensor([[1.0, 1.0], [8.0, 1.0]], dtype=torch.float64)
        >>> seen = Channels.of(torch.tensor([[-8.0, 1.0], [8.0, -1.0]]))
        >>> before, after = expected_error(torch.tensor([[0.1, 0.8]]), seen, 8, 8, factors)
        >>> bool(after < before)
        True
    """
    rows = weight[:: max(1, len(weight) // _ROWS)]
    stand_for = len(weight) / len(rows)
    power = seen.squares / seen.rows / factors.square()
    error = torch.zeros(len(factors), dtype=torch.float64)
    if activation_bits != FLOAT_BITS:
        reach = (seen.high / factors).amax(1).clamp(min=0) - (seen.low / factors).amin(1).clamp(max=0)
        noise = torch.minimum(power, (reach / (2**activation_bits - 1)).square()[:, None] / 12)
        error += (noise * factors.square()) @ weight.square().sum(0, dtype=torch.float64).cpu()
    if weight_bits != FLOAT_BITS:
        grid = UniformQuantizer(weight_bits, symmetric=True, granularity=PerChannel(0))
        multiplied = rows * factors.to(rows)[:, None]  # (K, rows, channels)
        multiplied = multiplied.flatten(0, 1) if per_channel else multiplied.flatten(1)  # (grids, what they serve)
        grid.set_range(*extrema(multiplied, grid.granularity))
        squares = (grid(multiplied) - multiplied).square_().view(len(factors), *rows.shape).sum(1)
        error += stand_for * (squares.cpu() * power).sum(1)
    return error


def _offers(*readers: tuple[Tensor, Channels]) -> Tensor:
    """Return what channels could be divided by, (K, channels): nothing first, then a share of their differences."""
    magnitude = torch.stack([torch.maximum(-seen.low, seen.high) for _, seen in readers]).amax(0)
    largest = torch.stack([weight.abs().amax(0).double().cpu() for weight, _ in readers]).amax(0)
    alive = (magnitude > 0) & (largest > 0)
    exponents = torch.zeros(1 + len(_SHARES), len(magnitude), dtype=torch.float64)
    if alive.any():
        magnitude, largest = magnitude[alive].log2(), largest[alive].log2()
        shares = _SHARES[:, None]
        found = shares * magnitude - (1 - shares) * largest
        found = found - found.median(dim=1, keepdim=True).values
        exponents[1:, alive] = found.round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.exp2(exponents)


@dataclass
class _Watch:
    """Hooks that find out who makes channels for whom, and look at them.

    Attributes:
        names: Every module's name.
        linear: The names of the quantizable linear layers.
        text: Names of the layers of the text tower.
        rows: Which rows of the batch at hand count.
        makers: By reader, the name of what makes its channels and the row of the first one.
        channels: What each reader read.
        normed: The last LayerNorm's name and output, by width.
    """

    names: dict[nn.Module, str]
    linear: dict[nn.Module, str]
    text: set[str]
    rows: Rows
    makers: dict[str, tuple[str, int]]
    channels: dict[str, Channels] = field(default_factory=dict)
    normed: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def made(self, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        """Remember what a LayerNorm returned."""
        self.normed[output.shape[-1]] = self.names[module], output.reshape(-1, output.shape[-1])

    def read(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Look at what a linear layer reads, if it is rows of the last LayerNorm or comes from an attention."""
        name, x = self.linear[module], inputs[0]
        if not x.numel():
            return
        maker, output = self.normed.get(x.shape[-1], ("", x))
        if _in_one_block(maker, name) and bool((output == x.reshape(-1, x.shape[-1])[0]).all(-1).any()):
            self.makers[name] = maker, 0
        if name in self.makers:
            if name in self.text:
                (x,) = valid_operands(module, (x,), self.rows, averages=False)
            if x.numel():
                _join(self.channels, name, Channels.of(x.reshape(-1, x.shape[-1])))


def _look(
    calibration: Calibration, end_token: bool, drop_start: bool, *, values: bool
) -> tuple[list[Tensor], list[Link], dict[str, Channels]]:
    """Run the calibration set once.

    Returns:
        The outputs of one batch of each kind; over all ranks who makes channels for whom, and what the readers read.
    """
    modules = _modules(calibration)
    linear = {layer.module: layer.name for layer in calibration.layers if layer.kind.name == "linear"}
    watch = _Watch(
        names={module: name for name, module in modules.items()},
        linear=linear,
        text={layer.name for layer in calibration.layers if layer.tower == "text"},
        rows=Rows(torch.zeros(0, dtype=torch.int64), drop_start=drop_start),
        makers=dict(_attention_links(modules, linear)) if values else {},
    )
    outputs: list[Tensor] = []
    examples = list(one_of_each_kind(calibration.batches))
    with ExitStack() as stack:
        for module in watch.names:
            if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                stack.callback(module.register_forward_hook(watch.made).remove)
        for module in linear:
            stack.callback(module.register_forward_pre_hook(watch.read).remove)
        stack.enter_context(measuring_texts(calibration, lambda: watch.rows, end_token=end_token))
        for batch in calibration.batches:
            watch.rows.lengths = None
            found = named_outputs(calibration.forward(batch))
            if any(batch is example for example in examples):
                outputs += found.values()
                examples = [example for example in examples if example is not batch]
    readers: dict[tuple[str, int], set[str]] = {}
    everywhere: dict[str, Channels] = {}
    for makers, channels in gather((watch.makers, watch.channels)):
        for name, seen in channels.items():
            readers.setdefault(makers[name], set()).add(name)
            _join(everywhere, name, seen)
    return outputs, [Link(*maker, tuple(sorted(names))) for maker, names in sorted(readers.items())], everywhere


def _join(channels: dict[str, Channels], name: str, seen: Channels) -> None:
    channels[name] = channels[name] + seen if name in channels else seen


def _attention_links(
    modules: Mapping[str, nn.Module], linear: Mapping[nn.Module, str]
) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield (output projection, (projection to the values, first row of it)) of the attentions that are written out."""
    for module in modules.values():
        if not isinstance(module, ExplicitAttention) or module.hands_on_values:
            continue
        if isinstance(module.out_proj, nn.Linear):
            maker = next(module._modules[name] for name in ("qkv_proj", "kv_proj", "v_proj") if name in module._modules)
            if maker in linear and module.out_proj in linear and isinstance(maker, nn.Linear):
                first = maker.out_features - module.out_proj.in_features
                if getattr(maker, "segments", (maker.out_features,))[-1] == module.out_proj.in_features:
                    yield linear[module.out_proj], (linear[maker], first)


def _in_one_block(a: str, b: str) -> bool:
    """Whether two modules lie in the same member of a list of modules."""
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False))
    return any(part.isdigit() for part, _ in shared)


def _scale(calibration: Calibration, chosen: Sequence[tuple[Link, Tensor]], before: Sequence[Tensor]) -> list[Link]:
    """Scale where the outputs stay the same to the bit; where they do not, each half by itself."""
    if not chosen:
        return []
    modules = _modules(calibration)
    for link, factors in chosen:
        _move(modules, link, factors)
        calibration.on_undo.append(partial(_move, modules, link, 1 / factors))
    if all(gather(_same(calibration, before))):
        return [link for link, _ in chosen]
    for _ in chosen:
        calibration.on_undo.pop()()
    middle = len(chosen) // 2
    halves = (chosen[:middle], chosen[middle:]) if middle else ()
    return [link for half in halves for link in _scale(calibration, half, before)]


def _same(calibration: Calibration, before: Sequence[Tensor]) -> bool:
    examples = one_of_each_kind(calibration.batches)
    after = [x for batch in examples for x in named_outputs(calibration.forward(batch)).values()]
    return all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@torch.no_grad()
def _move(modules: Mapping[str, nn.Module], link: Link, factors: Tensor) -> None:
    """Divide channels where they are made, and multiply the weights that read them."""
    rows = slice(link.first, link.first + len(factors))
    for _, parameter in modules[link.maker].named_parameters(recurse=False):
        parameter[rows] /= factors.to(parameter).view(-1, *[1] * (parameter.dim() - 1))
    for name in link.readers:
        modules[name].get_parameter("weight").mul_(factors.to(modules[name].get_parameter("weight")))


def _modules(calibration: Calibration) -> dict[str, nn.Module]:
    return {f"{root}.{name}": m for root, network in calibration.roots.items() for name, m in network.named_modules()}
