"""Links of every kind that channels can be scaled along, with a sample of what their readers read.

Beside the links of `lit_clipq.calibration.channels` these are: convolutions whose output reaches another convolution
through nothing but ReLU and pooling; the branch of a gated MLP that is not activated; and layers that read a LayerNorm
which others read, too, so that they can only divide their input themselves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.batches import hashed, unit_keys
from lit_clipq.calibration.channels import ChannelObserver, Channels, Link, SeenChannels, _Maker
from lit_clipq.distributed import gather
from lit_clipq.nn.layout import PATCHES, ROWS, Layout
from lit_clipq.nn.swap import Layer

_ELEMENTS = 2**19  # of a sample, where that is at least `_FEWEST` units
_FEWEST, _MOST = 8, 1024
_PASSING = (nn.ReLU, nn.LeakyReLU, nn.AvgPool2d, nn.MaxPool2d, nn.Identity, nn.Dropout)  # commute with factors > 0


@dataclass(frozen=True)
class Sample:
    """Some of the units that a layer read: rows (N, in) or maps (N, C, H, W), on the layer's device."""

    keys: Tensor
    """Their global numbers, int64 (N,), ascending by their hash, which is a random order."""
    units: Tensor
    """What was read."""

    def empty(self) -> "Sample":
        """Return a sample of no units of this shape."""
        return Sample(self.keys[:0], self.units[:0])

    def joined(self, other: "Sample", most: int) -> "Sample":
        """Join two samples; of more than `most` units those with the smallest hash stay."""
        keys, units = torch.cat([self.keys, other.keys]), torch.cat([self.units, other.units])
        order = hashed(keys).argsort(stable=True)[:most]
        return Sample(keys[order], units[order])


@dataclass(frozen=True)
class SeenLinks(SeenChannels):
    """Links of every kind, what their readers read, and a sample of it, the same on every rank."""

    samples: Mapping[str, Sample]


class LinkObserver(ChannelObserver):
    """Finds links of every kind, looks at their channels, and keeps a sample of what their readers read.

    Args:
        modules: Every module by its name.
        layers: The quantizable layers.
        text: Names of the layers under the end-token rule.
        values: Whether values of attentions count as well.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], layers: Sequence[Layer], text: frozenset[str], *, values: bool = True
    ) -> None:
        super().__init__(modules, layers, text, values=values)
        self._makers.update(_gates(modules, self.linear))
        convolutions = [layer for layer in layers if isinstance(layer.module, nn.Conv2d)]
        self.makes_maps = {layer.module: layer.name for layer in convolutions}
        self.reads_maps = {c.module: c.name for c in convolutions if c.kind.layout(c.module) is PATCHES}
        self._flow: dict[tuple[int, torch.Size], tuple[str, StorageWeakRef, int]] = {}
        self._mixed: set[str] = set()
        self._samples: dict[str, Sample] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook LayerNorms, linear layers, convolutions, and what maps pass through."""
        yield from super().hooks()
        for module in self.names:
            if module in self.makes_maps:
                yield module.register_forward_hook(self._made_maps)
            elif isinstance(module, _PASSING):
                yield module.register_forward_hook(self._passed)
        for module in self.reads_maps:
            yield module.register_forward_pre_hook(self._read_maps)

    def found(self) -> SeenLinks:
        """Return links, channels and samples over all ranks; a collective call."""
        seen = super().found()
        everyone = gather(({n: Sample(s.keys.cpu(), s.units.cpu()) for n, s in self._samples.items()}, self._mixed))
        mixed = {name for _, names in everyone for name in names}
        links = [_without(link, mixed) for link in seen.links]
        kept = {name for link in links for name in link.readers}
        samples: dict[str, Sample] = {}
        for own, _ in everyone:
            for name, sample in own.items():
                if name in kept:
                    samples[name] = sample.joined(samples.get(name, sample.empty()), _most(sample.units))
        return SeenLinks(tuple(link for link in links if link.readers), seen.channels, samples)

    def end(self, outputs: Any) -> None:  # noqa: ARG002
        """Forget the memory of this batch."""
        self._flow.clear()

    def _made_maps(self, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        self._remember(self.makes_maps[module], output)

    def _passed(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        x = inputs[0] if inputs else None
        if isinstance(x, Tensor) and isinstance(output, Tensor):
            in_place = output.data_ptr() == x.data_ptr() and output._version == x._version
            maker = self._maker_of(x, changes=(0, 1) if in_place else (0,))
            if maker:
                self._remember(maker, output)

    def _remember(self, maker: str, x: Tensor) -> None:
        self._flow[x.data_ptr(), x.shape] = maker, StorageWeakRef(x.untyped_storage()), x._version

    def _maker_of(self, x: Tensor, changes: tuple[int, ...] = (0,)) -> str:
        maker, storage, version = self._flow.get((x.data_ptr(), x.shape), ("", None, 0))
        alive = storage is not None and not storage.expired() and x._version - version in changes
        return maker if alive else ""

    def _read_maps(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        name, x = self.reads_maps[module], inputs[0]
        maker = self._maker_of(x)
        known = self._makers.setdefault(name, _Maker(maker)) if maker else self._makers.get(name)
        if known is None or known.name != maker:
            self._mixed |= {name} if known is not None else set()
            return
        if x.numel():
            low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
            squares = x.square().sum((0, 2, 3), dtype=torch.float64)
            count = x.numel() // x.shape[1]
            self._see(name, Channels(low.double().cpu(), high.double().cpu(), squares.cpu(), count))
            self._sample(name, PATCHES, x)

    def _found_maker(self, maker: str, name: str) -> _Maker | None:
        """Return the maker of what a layer outside of the LayerNorm's block reads, too."""
        return super()._found_maker(maker, name) or (_Maker(maker, at_reader=True) if maker else None)

    def _looked(self, name: str, x: Tensor) -> None:
        self._sample(name, ROWS, x)

    def _sample(self, name: str, layout: Layout, x: Tensor) -> None:
        mask = self.rows.mask(text=name in self.text) if layout is ROWS else None
        (units,), keys = layout.operands((x,), mask), unit_keys(layout, x, self.rows, mask)
        order = hashed(keys).argsort(stable=True)[: _most(units)].to(x.device)
        new = Sample(keys.to(x.device)[order], units.detach()[order].float())
        old = self._samples.get(name)
        self._samples[name] = new if old is None else old.joined(new, _most(units))


def _most(units: Tensor) -> int:
    return min(_MOST, max(_FEWEST, _ELEMENTS // max(units[:1].numel(), 1)))


def _without(link: Link, names: set[str]) -> Link:
    return replace(link, readers=tuple(name for name in link.readers if name not in names))


def _gates(modules: Mapping[str, nn.Module], linear: Mapping[nn.Module, str]) -> Iterator[tuple[str, _Maker]]:
    """Yield (second layer, branch that is multiplied by the gate) of timm's gated MLPs without an inner norm."""
    for module in modules.values():
        parts: Any = module._modules
        if not isinstance(parts.get("norm"), nn.Identity) or parts.get("fc2") not in linear:
            continue
        if parts.get("fc1_x") in linear and parts.get("fc1_g") in linear:
            yield linear[parts["fc2"]], _Maker(linear[parts["fc1_x"]])
        elif hasattr(module, "gate_last") and parts.get("fc1") in linear:
            half = parts["fc1"].out_features // 2
            yield linear[parts["fc2"]], _Maker(linear[parts["fc1"]], 0 if module.gate_last else half)
