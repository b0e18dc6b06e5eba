"""Stages that fit whole blocks, front to back, each behind the quantized and fitted blocks in front of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.batches import sample_of, unit_keys
from lit_clipq.calibration.emulation import Parameters, emulated, holding, parameters_of, rounded_weight
from lit_clipq.calibration.passes import Observer
from lit_clipq.distributed import gather
from lit_clipq.nn.layout import ROWS
from lit_clipq.nn.modules import Phase, QModule, QWeighted
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.stage import Scope, Stage

OTHER = "its input and output are not rows of the same shape"


@dataclass(frozen=True)
class BlockRows:
    """Rows of one batch that count, each float32 (N, d)."""

    inputs: Tensor
    """What the block gets, behind quantized blocks."""
    wanted: Tensor
    """What its float form makes of it."""
    found: Tensor
    """What its quantized form makes of it."""
    samples: Tensor
    """Global sample number of each, int64 (N,)."""


class BlockFit(ABC):
    """What a stage does for one block: it adds up rows, then fits.

    Attributes:
        width: Channels of the rows.
    """

    width: int

    @abstractmethod
    def add(self, rows: BlockRows) -> None:
        """Add the rows of a batch."""

    @abstractmethod
    def finish(self, rows_per_sample: float) -> Mapping[str, Any]:
        """Fit, change the draft, and return the report of the block; a collective call."""


class BlockStage(Stage):
    """Works on one block at a time: the members of lists of modules that hold quantized layers."""

    scope = Scope.BLOCK

    @abstractmethod
    def begin(self, draft: Draft, name: str, width: int) -> BlockFit:
        """Begin with a block whose inputs and outputs have rows of that width."""


def block_of(name: str) -> str:
    """Return the block that a layer lies in, or an empty text.

    Example:
        >>> block_of("clip.visual.transformer.resblocks.0.mlp.c_fc"), block_of("clip.visual.proj")
        ('clip.visual.transformer.resblocks.0', '')
    """
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return "" if place is None else ".".join(parts[: place + 1])


def block_steps(names: Sequence[str], tower_of: Mapping[str, str]) -> list[list[str]]:
    """Return the blocks of layers: the first of every tower, then the second, and so on.

    Args:
        names: Layers in order of the network.
        tower_of: The tower of each.
    """
    towers: dict[str, dict[str, None]] = {}
    for name in names:
        if block_of(name):
            towers.setdefault(tower_of[name], {})[block_of(name)] = None
    return [[block for block in step if block] for step in zip_longest(*towers.values())]


def visit_blocks(draft: Draft, floats: Mapping[str, Parameters]) -> None:
    """Run the block stages of a draft whose layers are fitted and not yet frozen.

    Args:
        draft: The draft.
        floats: Float weight and bias of each layer.
    """
    session, modules = draft.session, draft.modules
    rounded = {name: (rounded_weight(m), m.bias) for name, m in modules.items() if isinstance(m, QWeighted)}
    towers = {layer.name: layer.tower for layer in session.layers}
    for stage in (stage for stage in draft.stages if isinstance(stage, BlockStage)):
        steps = block_steps(session.searched(draft.plan), towers)
        if not steps:
            draft.reports[stage.name] = {"reason": "no quantized layer lies in a list of blocks"}
        for step in steps:
            with draft.in_place(), emulated(modules, rounded):
                own = {b: {n: m for n, m in modules.items() if n.startswith(f"{b}.")} for b in step}
                observers = [
                    BlockObserver(stage, draft, b, own[b], floats, any(n in session.text_layers for n in own[b]))
                    for b in step
                ]
                session.run(observers)
            for block, observer in zip(step, observers, strict=True):
                draft.reports.setdefault(stage.name, {})[block] = observer.finish()


@dataclass
class BlockObserver(Observer):
    """Runs the float form of a block on what its quantized form got, and hands the rows of both to a stage."""

    stage: BlockStage
    draft: Draft
    name: str
    layers: Mapping[str, QModule]
    floats: Mapping[str, Parameters]
    text: bool
    unfit: str = ""
    fit: BlockFit | None = None
    rows_seen: int = 0
    samples_seen: int = 0

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook the block."""
        yield self.draft.session.modules[self.name].register_forward_hook(self._look, with_kwargs=True, prepend=True)

    def _look(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.shape != output.shape or x.dim() != 3:
            self.unfit = OTHER
        if self.unfit:
            return
        assert isinstance(x, Tensor)  # noqa: S101 - said above
        with self._float():
            wanted = block.forward(*inputs, **named)
        mask = self.rows.mask(text=self.text)
        samples = sample_of(unit_keys(ROWS, output, self.rows, mask))
        inputs_, wanted_, found = (ROWS.product(y.detach(), mask).float() for y in (x, wanted, output))
        self.rows_seen += x.shape[:-1].numel()
        if self.fit is None:
            self.fit = self.stage.begin(self.draft, self.name, x.shape[-1])
        self.fit.add(BlockRows(inputs_, wanted_, found, samples))

    def end(self, outputs: Any) -> None:  # noqa: ARG002
        """Count the samples."""
        self.samples_seen += len(self.rows.samples)

    @contextmanager
    def _float(self) -> Iterator[None]:
        """Let the block's layers be float."""
        try:
            for module in self.layers.values():
                module.phase = Phase.FLOAT
            with holding(self.layers, self.floats):
                yield
        finally:
            for module in self.layers.values():
                module.phase = Phase.QUANTIZED

    def finish(self) -> Mapping[str, Any]:
        """Fit, the same on every rank."""
        own = 0 if self.fit is None else self.fit.width
        everyone = gather((self.unfit, own, self.rows_seen, self.samples_seen))
        unfit = next((reason for reason, *_ in everyone if reason), "")
        width = max(width for _, width, _, _ in everyone)
        if unfit or not width:
            return {"kept": False, "reason": unfit or "no batch reached it"}
        fit = self.fit or self.stage.begin(self.draft, self.name, width)
        return fit.finish(sum(rows for *_, rows, _ in everyone) / sum(samples for *_, samples in everyone))


def floats_of(draft: Draft) -> dict[str, Parameters]:
    """Return the float weight and bias of each layer of a draft, before layer stages change them."""
    return {name: parameters_of(module) for name, module in draft.modules.items()}


def has_block_stages(stages: Sequence[Stage]) -> bool:
    """Whether any of the stages works on blocks."""
    return any(isinstance(stage, BlockStage) for stage in stages)
