"""Channels that one module of a block makes and linear layers of the block read."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.passes import Observer
from lit_clipq.distributed import gather
from lit_clipq.nn.attention import ExplicitAttention
from lit_clipq.nn.layout import ROWS
from lit_clipq.nn.swap import Layer


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
    average: str = ""
    """Name of the product of attention weights and values that the channels pass through, head by head; or empty."""
    heads: int = 1
    """How many heads that product has."""
    at_reader: bool = False
    """Whether others than the block read the maker too, so that only the reader itself can divide its input."""


@dataclass(frozen=True)
class SeenChannels:
    """Links, and what their readers read, over all ranks."""

    links: tuple[Link, ...]
    channels: Mapping[str, Channels]


@dataclass(frozen=True)
class _Maker:
    name: str
    first: int = 0
    average: str = ""
    heads: int = 1
    at_reader: bool = False


class ChannelObserver(Observer):
    """Finds out who makes channels for whom, and looks at them.

    A LayerNorm makes what a linear layer of the same block reads, if that is rows of what it returned last; a
    projection to values makes what the output projection of its attention reads.

    Args:
        modules: Every module by its name.
        layers: The quantizable layers.
        text: Names of the layers under the end-token rule.
        values: Whether values of attentions count as well.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], layers: Sequence[Layer], text: frozenset[str], *, values: bool = True
    ) -> None:
        self.names = {module: name for name, module in modules.items()}
        self.linear = {layer.module: layer.name for layer in layers if layer.kind.layout(layer.module) is ROWS}
        self.linear = {m: name for m, name in self.linear.items() if isinstance(m, nn.Linear)}
        self.text = text
        self._makers: dict[str, _Maker] = dict(_values(modules, self.linear)) if values else {}
        self._channels: dict[str, Channels] = {}
        self._normed: dict[int, tuple[str, Tensor]] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook every LayerNorm with a gain, and every linear layer."""
        for module in self.names:
            if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                yield module.register_forward_hook(self._made)
        for module in self.linear:
            yield module.register_forward_pre_hook(self._read)

    def found(self) -> SeenChannels:
        """Return links and channels over all ranks; a collective call."""
        readers: dict[_Maker, set[str]] = {}
        everywhere: dict[str, Channels] = {}
        for makers, channels in gather((self._makers, self._channels)):
            for name, seen in channels.items():
                readers.setdefault(makers[name], set()).add(name)
                _join(everywhere, name, seen)
        ordered = sorted(readers.items(), key=lambda item: (item[0].name, item[0].first, item[0].at_reader))
        links = (Link(m.name, m.first, tuple(sorted(names)), m.average, m.heads, m.at_reader) for m, names in ordered)
        return SeenChannels(tuple(links), everywhere)

    def _made(self, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        self._normed[output.shape[-1]] = self.names[module], output.reshape(-1, output.shape[-1])

    def _read(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        name, x = self.linear[module], inputs[0]
        if not x.numel():
            return
        maker, output = self._normed.get(x.shape[-1], ("", x))
        known = self._found_maker(maker, name)
        if known is not None and bool((output == x.reshape(-1, x.shape[-1])[0]).all(-1).any()):
            self._makers[name] = known
        if name in self._makers:
            (rows,) = ROWS.operands((x,), self.rows.mask(text=name in self.text))
            if rows.numel():
                self._see(name, Channels.of(rows))
                self._looked(name, x)

    def _found_maker(self, maker: str, name: str) -> _Maker | None:
        """Return the LayerNorm as the maker of what a layer reads, if the two lie in one block."""
        return _Maker(maker) if _in_one_block(maker, name) else None

    def _looked(self, name: str, x: Tensor) -> None:
        """Take note of an input whose channels were seen."""

    def _see(self, name: str, seen: Channels) -> None:
        _join(self._channels, name, seen)


def _join(channels: dict[str, Channels], name: str, seen: Channels) -> None:
    channels[name] = channels[name] + seen if name in channels else seen


def _values(modules: Mapping[str, nn.Module], linear: Mapping[nn.Module, str]) -> Iterator[tuple[str, _Maker]]:
    """Yield (output projection, what makes its channels) of the attentions that are written out."""
    for name, module in modules.items():
        if not isinstance(module, ExplicitAttention) or module.hands_on_values:
            continue
        if module.av.prefix_size:
            continue  # the values of registers are constants, which nobody scales
        if isinstance(module.out_proj, nn.Linear):
            maker = next(module._modules[part] for part in ("qkv_proj", "kv_proj", "v_proj") if part in module._modules)
            if maker in linear and module.out_proj in linear and isinstance(maker, nn.Linear):
                first = maker.out_features - module.out_proj.in_features
                if getattr(maker, "segments", (maker.out_features,))[-1] == module.out_proj.in_features:
                    yield linear[module.out_proj], _Maker(linear[maker], first, f"{name}.av", module.num_heads)


def _in_one_block(a: str, b: str) -> bool:
    """Whether two modules lie in the same member of a list of modules."""
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False))
    return any(part.isdigit() for part, _ in shared)
