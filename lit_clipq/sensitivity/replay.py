"""Run only what a change of some layers reaches: blocks in front of them give what they gave before."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_clipq.calibration.objective import named_outputs
from lit_clipq.calibration.session import Session
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.swap import swap, unswap

_CLIP_TOWERS = {"vision", "text"}


def block_of(name: str) -> str | None:
    """Return the member of a list of modules that a layer lies in; `None` for a layer outside of any.

    Example:
        >>> block_of("clip.visual.transformer.resblocks.3.mlp.c_fc")
        'clip.visual.transformer.resblocks.3'
    """
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[: place + 1])


@dataclass
class Replay:
    """A network as it is when this is made, and what it gives when some of its layers are others.

    Args:
        session: Its networks and batches.
        towers: Tower of each layer.
        placed: Q-modules that stand in the place of float layers all the while, by name.
    """

    session: Session
    towers: Mapping[str, str]
    placed: Mapping[str, QModule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cache: list[dict[str, Any]] = []
        self._order: dict[str, tuple[int, int]] = {}  # when a block or a layer was called and when it returned
        self._calls: dict[str, int] = {}
        self.outputs: list[dict[str, Tensor]] = []
        names = {layer.name: block_of(layer.name) for layer in self.session.layers}
        self._blocks = {block: self.towers[name] for name, block in names.items() if block is not None}
        with self.in_place({}), torch.no_grad():
            for batch in self.session.data.batches:
                self._cache.append({})
                with self._recorded():
                    self.outputs.append(dict(named_outputs(self.session.data.forward(batch))))

    @contextmanager
    def in_place(self, changed: Mapping[str, QModule | None]) -> Iterator[None]:
        """Put Q-modules in the place of layers, `None` for the float layer, beside those that stand all the while."""
        modules = {name: m for name, m in {**self.placed, **changed}.items() if m is not None}
        layers = [self.session.layer[name] for name in modules]
        swap(self.session.roots, layers, lambda layer: modules[layer.name])
        try:
            yield
        finally:
            unswap(self.session.roots, self.session.layers, modules)

    @torch.no_grad()
    def run(self, changed: Mapping[str, QModule | None]) -> list[dict[str, Tensor]]:
        """Return the outputs of every batch with some layers changed; only what follows them is computed."""
        found = []
        with self.in_place(changed):
            kept = self._unreached(list(changed))
            for number, batch in enumerate(self.session.data.batches):
                with self._replayed([block for block in kept if block in self._cache[number]], number):
                    found.append(dict(named_outputs(self.session.data.forward(batch))))
        return found

    def _unreached(self, changed: Sequence[str]) -> list[str]:
        """Return the blocks that no changed layer reaches: those in front, and those of the other tower of a CLIP."""
        first = min((self._order[name][0] for name in changed if name in self._order), default=0)
        towers = {self.towers[name] for name in changed}
        apart = _CLIP_TOWERS - towers if towers <= _CLIP_TOWERS else set()
        single = [block for block in self._blocks if self._calls.get(block) == len(self._cache)]
        return [b for b in single if self._order[b][1] < first or self._blocks[b] in apart]

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep what each block returns, and when blocks and layers are called."""
        clock = 0

        def starts(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:  # noqa: ARG001
                nonlocal clock
                clock += 1
                old = self._order.get(name, (clock, 0))
                self._order[name] = min(old[0], clock), old[1]

            return hook

        def ends(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
                nonlocal clock
                clock += 1
                self._calls[name] = self._calls.get(name, 0) + 1
                start, old = self._order[name]
                self._order[name] = start, max(old, clock)
                self._cache[-1][name] = output

            return hook

        modules = {f"{root}.{n}": m for root, net in self.session.roots.items() for n, m in net.named_modules()}
        with ExitStack() as stack:
            for block in self._blocks:
                stack.callback(modules[block].register_forward_pre_hook(starts(block)).remove)
                stack.callback(modules[block].register_forward_hook(ends(block)).remove)
            for layer in self.session.layers:
                if layer.name in modules and layer.name not in self._blocks:
                    stack.callback(modules[layer.name].register_forward_pre_hook(starts(layer.name)).remove)
            yield

    @contextmanager
    def _replayed(self, blocks: Sequence[str], number: int) -> Iterator[None]:
        """Let blocks return what they returned for a batch; a copy, because what follows may work in place."""
        modules = {f"{root}.{n}": m for root, net in self.session.roots.items() for n, m in net.named_modules()}

        def gives(value: Any) -> Any:
            return lambda *_, **__: tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)

        try:
            for block in blocks:
                modules[block].forward = gives(self._cache[number][block])
            yield
        finally:
            for block in blocks:
                modules[block].__dict__.pop("forward", None)


def relative_error(
    outputs: Sequence[Mapping[str, Tensor]], wanted: Sequence[Mapping[str, Tensor]], tower: str
) -> float:
    """Return the squared error of outputs relative to what they should be, float64 sums over all batches.

    Args:
        outputs: Of every batch, by name.
        wanted: Those of the float network.
        tower: What was changed; of a CLIP's embeddings only those of that tower count.
    """
    error = signal = 0.0
    for have, want in zip(outputs, wanted, strict=True):
        for name in relevant(tower, want):
            size = max(want[name][0].numel(), 1)
            error += ((have[name].double() - want[name].double()).square().sum() / size).item()
            signal += (want[name].double().square().sum() / size).item()
    return error / signal if signal > 0 else 0.0


def relevant(tower: str, names: Mapping[str, Any]) -> list[str]:
    """Name the outputs that a tower leads to: of a CLIP's two embeddings its own, else all."""
    own = {"vision": "image", "text": "text"}.get(tower)
    return [own] if own is not None and own in names and set(names) <= {"image", "text"} else list(names)
