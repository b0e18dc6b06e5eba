"""The one verb: `quantize(model, batches, recipe)`; and `quantize_many`, several recipes from one collection."""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.batches import Batch, count_samples
from lit_clipq.calibration.budget import Budget
from lit_clipq.calibration.needs import Need
from lit_clipq.calibration.passes import CalibrationSet
from lit_clipq.calibration.profile import Profile, merged, profile
from lit_clipq.calibration.results import LayerResult
from lit_clipq.calibration.session import Session
from lit_clipq.distributed import check_same_on_all_ranks, gather, world_size
from lit_clipq.errors import CalibrationError, ConfigError, ModelError
from lit_clipq.inputs import check_batches, check_model
from lit_clipq.models import encode_image, encode_text, fold_batchnorm, has_end_token_rule, make_explicit
from lit_clipq.nn.layout import ROWS
from lit_clipq.nn.size import stored_bytes
from lit_clipq.nn.swap import Layer, QuantizationMap, find_layers, towers
from lit_clipq.recipes import Recipe
from lit_clipq.recipes.widths import TOWERS
from lit_clipq.stages.blocks import block_steps, has_block_stages
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.schedule import (
    asked,
    blocks_side_by_side,
    layer_stages,
    needs_one_draft,
    prepare,
    visit,
    whole_passes,
)
from lit_clipq.text_lengths import TextLengths, Texts

log = logging.getLogger(__name__)

Forward = Callable[[Batch], Any]
"""Runs the networks on a batch and returns what matters, a tensor or tensors by name."""
Progress = Callable[[str, int, int], None]
"""Told a layer that is done, how many are, and of how many."""

UNREACHED = "no calibration forward of the model reaches it"
_RANGE_BYTES = 8  # a float32 minimum and maximum


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did, or with `dry_run` would do."""

    recipe: str
    """Name of the recipe."""
    map: QuantizationMap
    """Every matrix product and what became of it."""
    seconds: float
    """Wall time of calibration, reading the batches included; 0 for a dry run."""
    float_bytes: int
    """Size of the float parameters and buffers."""
    quantized_bytes: int
    """Size of codes (packed to their width), grids and whatever stayed float."""
    passes: int
    """Passes over the calibration set."""
    memory_bytes: int
    """Predicted size of what calibration stores beside the model."""
    samples: int
    """Calibration samples of a pass, over all ranks."""
    layers: dict[str, LayerResult]
    """How the search of each layer went; empty for recipes that do not search."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each stage says of itself, by its name; plain values."""
    structure: tuple[Mapping[str, Any], ...] = ()
    """What the network has besides the float one; see `lit_clipq.nn.structure`."""


class Quantized:
    """One quantized form of a network, which takes its place and gives it back.

    Attributes:
        report: What was done.

    Args:
        draft: Its finished draft; `None` where nothing was to be quantized.
        report: What was done.
    """

    def __init__(self, draft: Draft | None, report: QuantizationReport) -> None:
        self._draft, self.report = draft, report

    @property
    def draft(self) -> Draft:
        """The finished draft that it is made of.

        Raises:
            ConfigError: If nothing was to be quantized.
        """
        if self._draft is None:
            raise ConfigError("nothing was quantized: all widths are 32 bits; give less")
        return self._draft

    def install(self) -> None:
        """Make the network the quantized one; another form of the same network must not be in place."""
        if self._draft is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._draft.install()

    def remove(self) -> None:
        """Make the network the float one again, to the bit."""
        if self._draft is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._draft.remove()

    @contextmanager
    def installed(self) -> Iterator[QuantizationReport]:
        """Let the network be the quantized one while the context is open."""
        self.install()
        try:
            yield self.report
        finally:
            self.remove()


def quantize(
    model: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    forward: Forward | None = None,
    texts: Texts | None = None,
    dry_run: bool = False,
    memory_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize a network in place, after training, from a few unlabelled batches.

    Attention is made explicit and BatchNorm folded first (the function stays the same); then the recipe's stages run,
    and frozen layers take the places of the float ones. If calibration fails the network stays float.

    Args:
        model: A CLIP, called `clip` in layer names, or named networks.
        batches: Calibration batches. For a CLIP (images, texts): float (B, 3, H, W) and int64 (B, L), either may be
            `None`. They are read into memory once, however many passes follow.
        recipe: What to do.
        forward: Runs the networks on a batch and returns what matters, a tensor or tensors by name; by default both
            towers of the CLIP. Recipes without gradients and equalising take any result.
        texts: Returns the texts of a batch as the CLIP's text tower sees them, int64 (B, L), or `None`; by default the
            second of a pair. Positions behind a text's end must not count.
        dry_run: Only plan and measure; no layer is swapped.
        memory_limit_bytes: Bound on what calibration stores beside the model; `None` is no bound.
        progress: Told the name of each layer whose search is done, how many are, and of how many.

    Returns:
        The report. With all widths at 32 bits nothing is touched.

    Raises:
        ConfigError: For a pattern that matches nothing, or a network without layers that are to be quantized.
        ModelError: For weights that are not finite.
        CalibrationError: For an empty calibration set, layers it does not reach, NaN or Inf on the way, a memory limit
            below what is needed, ranks that hold different networks.

    Example:
        >>> from lit_clipq.models import load_clip
        >>> from lit_clipq.recipes import make_recipe
        >>> clip = load_clip("mini-vit").model
        >>> batch = torch.rand(2, 3, 64, 64), torch.ones(2, 32, dtype=torch.long)
        >>> report = quantize(clip, [batch], make_recipe("vanilla"))
        >>> len(report.map.quantized) > 0
        True
    """
    (only,) = quantize_many(
        model,
        batches,
        [recipe],
        forward=forward,
        texts=texts,
        dry_run=dry_run,
        memory_limit_bytes=memory_limit_bytes,
        progress=progress,
    )
    if not dry_run:
        only.install()
    return only.report


def quantize_many(
    model: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Batch],
    recipes: Sequence[Recipe],
    *,
    forward: Forward | None = None,
    texts: Texts | None = None,
    dry_run: bool = False,
    memory_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Quantized]:
    """Quantize one network in several ways from one collection of observations.

    With float inputs a layer's grids depend on its own width alone, so recipes that differ in widths, patterns or
    stages share every pass over the calibration set, and layers of which they want the same are fitted once. Each
    result equals that of `quantize` to the bit. The network stays float, its attention explicit, until one of them is
    installed.

    Args:
        model: As for `quantize`.
        batches: As for `quantize`.
        recipes: What to do; those that collect differently (objective, seed, share of tokens) have passes of their own.
        forward: As for `quantize`.
        texts: As for `quantize`.
        dry_run: As for `quantize`.
        memory_limit_bytes: As for `quantize`.
        progress: As for `quantize`; the layers of all recipes count.

    Returns:
        One quantized form for each recipe; `seconds` of its report is the time of its share of the work.

    Raises:
        ConfigError: As for `quantize`; also for an empty list of recipes.
        ModelError: As for `quantize`.
        CalibrationError: As for `quantize`.

    Example:
        >>> from lit_clipq.models import load_clip
        >>> from lit_clipq.recipes import BitWidths, make_recipe
        >>> clip = load_clip("mini-vit").model
        >>> batch = torch.rand(2, 3, 64, 64), torch.ones(2, 32, dtype=torch.long)
        >>> widths = [BitWidths.resolve({"bits": bits}) for bits in (8, 4)]
        >>> eight, four = quantize_many(clip, [batch], [make_recipe("vanilla", bits=bits) for bits in widths])
        >>> with four.installed() as report:
        ...     report.map.quantized[0].weight_bits
        4
    """
    if not recipes:
        raise ConfigError("expected at least one recipe, got none; give one of `lit_clipq.recipes.recipe_names()`")
    roots = dict(model) if isinstance(model, Mapping) else {"clip": model}
    started = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad():
        check_model(roots)
        if world_size() == 1 or not isinstance(batches, Sized) or len(batches):  # another rank may hold all of them
            batches = check_batches(batches, pairs=forward is None)
        work = _Work(roots, list(batches), forward or _clip_forward(roots), texts)
        work.memory_limit_bytes = memory_limit_bytes
        return work.run(recipes, started, dry_run=dry_run, progress=progress)


def preview(model: nn.Module | Mapping[str, nn.Module], recipe: Recipe) -> QuantizationMap:
    """Plan without touching the model or any data: which layers `quantize` would quantize, to which widths.

    Args:
        model: As for `quantize`.
        recipe: What to do.

    Raises:
        ConfigError: For a pattern that matches nothing, or a layer that a stage cannot serve.
    """
    return planner(model)(recipe)


def planner(model: nn.Module | Mapping[str, nn.Module]) -> Callable[[Recipe], QuantizationMap]:
    """Return what does the same as `preview` for any number of recipes, from one look at the model.

    Args:
        model: As for `quantize`.
    """
    roots = dict(model) if isinstance(model, Mapping) else {"clip": model}
    with torch.inference_mode(False):
        shells = {name: copy.deepcopy(root).to("meta").eval() for name, root in roots.items()}
        for shell in shells.values():
            make_explicit(shell)
        layers = find_layers(shells)

    def planned(recipe: Recipe) -> QuantizationMap:
        plan = recipe.plan(layers)
        for stage in recipe.stages:
            stage.check_networks(plan, shells)
        return plan

    return planned


@dataclass
class _Work:
    """The networks and the batches of one call, and what is measured once for all recipes."""

    roots: Mapping[str, nn.Module]
    batches: list[Batch]
    forward: Forward
    texts: Texts | None = None
    memory_limit_bytes: int | None = None

    def run(
        self, recipes: Sequence[Recipe], started: float, *, dry_run: bool, progress: Progress | None
    ) -> list[Quantized]:
        float_bytes = sum(stored_bytes(root) for root in self.roots.values())
        found: dict[int, Quantized] = {}
        active = []
        for number, recipe in enumerate(recipes):
            if recipe.bits.all_float(towers(self.roots)):
                nothing = QuantizationReport(recipe.name, QuantizationMap(), 0.0, float_bytes, float_bytes, 0, 0, 0, {})
                found[number] = Quantized(None, nothing)
            else:
                active.append(number)
        if active:
            self._open()
            groups: dict[Any, list[int]] = {}
            plans = {number: self._plan(recipes[number]) for number in active}
            for number in active:
                groups.setdefault(self._shared(recipes[number], plans[number], number), []).append(number)
            tell = self._progress(progress, [[plans[number] for number in members] for members in groups.values()])
            for members in groups.values():
                begun = time.perf_counter() if found else started
                for number, result in zip(
                    members,
                    self._group([(recipes[n], plans[n]) for n in members], float_bytes, dry_run, tell),
                    strict=True,
                ):
                    share = 0.0 if dry_run else (time.perf_counter() - begun) / len(members)
                    found[number] = Quantized(result._draft, replace(result.report, seconds=share))
        return [found[number] for number in range(len(recipes))]

    def _open(self) -> None:
        """Prepare the networks and measure what a batch costs, the same on every rank."""
        _check_weights(self.roots)
        check_same_on_all_ranks(self.roots)
        for root in self.roots.values():
            root.eval()
            fold_batchnorm(root)
            make_explicit(root)
        self.layers = find_layers(self.roots)
        if not any(layer.kind.operands for layer in self.layers):
            raise ConfigError(
                f"expected linear, convolution or matrix product layers in {', '.join(self.roots)}; give a network "
                "that has some"
            )
        self.data = CalibrationSet(self.batches, self.forward, self._lengths())
        self.cost: Profile | None = None
        samples = gather(sum(count_samples(batch) for batch in self.batches))
        self.samples, self.most = sum(samples), max(samples)

    def _plan(self, recipe: Recipe) -> QuantizationMap:
        planned = recipe.plan(self.layers)
        if not planned.quantized:
            raise ConfigError(f"no layer is left to quantize, {planned.entries[0].name}: {planned.entries[0].reason}")
        for stage in recipe.stages:
            stage.check_networks(planned, self.roots)
        if self.cost is None:
            self.cost = _measure(self.roots, self.layers, self.data)
        planned = self._without_unreached(planned.with_macs(self.cost.macs))
        if self.text_rule and any(entry.tower == "text" for entry in planned.quantized):
            self.text_lengths.needed = True
        if not planned.quantized:
            raise ConfigError("no layer is left to quantize: the calibration forward reaches none of those chosen")
        return planned

    def _without_unreached(self, planned: QuantizationMap) -> QuantizationMap:
        """Leave layers float that no forward reaches, and refuse a set without a batch for a tower.

        Raises:
            CalibrationError: If no layer of a tower with layers to quantize saw a batch.
        """
        reached = set(self._reached(planned)) | {name for name, macs in (self.cost or Profile()).macs.items() if macs}
        towers_reached = {layer.tower for layer in self.layers if layer.name in reached}
        kinds = {layer.name: layer.kind for layer in self.layers}
        unseen = [e for e in planned.quantized if e.name not in reached and not kinds[e.name].is_table]
        missing = [entry for entry in unseen if entry.tower not in towers_reached]
        if missing:
            raise CalibrationError(
                f"layer {missing[0].name} saw 0 calibration batches ({len(missing)} such layers); give batches that "
                "reach it (pictures for the image tower, texts for the text tower), exclude it, or set its tower to 32 "
                f"bits ({_at_32_bits(missing[0].tower)})"
            )
        return planned.left_float({entry.name: UNREACHED for entry in unseen})

    def _lengths(self) -> Callable[[Batch], Tensor | None]:
        """Return what tells the valid positions of a batch's texts, where the text tower has the end-token rule."""
        clip = self.roots.get("clip")
        self.text_rule = clip is not None and has_end_token_rule(clip)
        if clip is None or not self.text_rule:
            return lambda _: None
        self.text_lengths = TextLengths(clip, self.texts)
        return self.text_lengths

    def _shared(self, recipe: Recipe, plan: QuantizationMap, number: int) -> Any:
        """Return what recipes have in common that one collection serves."""
        alone = number if needs_one_draft(recipe.stages, recipe.propagate) else -1
        collected = asked(recipe.stages) & {need for need in Need if need.by_layer or need is Need.RANGES}
        return recipe.collection(plan, self.layers, text_rule=self.text_rule), collected, recipe.propagate, alone

    def _progress(
        self, progress: Progress | None, groups: Sequence[Sequence[QuantizationMap]]
    ) -> Callable[[str], None]:
        if progress is None:
            return lambda _: None
        tell, done = progress, 0
        total = sum(len({name for plan in plans for name in self._reached(plan)}) for plans in groups)

        def told(name: str) -> None:
            nonlocal done
            done += 1
            tell(name, done, total)

        return told

    def _reached(self, plan: QuantizationMap) -> list[str]:
        assert self.cost is not None  # noqa: S101 - `_plan` measured it
        cost = self.cost
        return [e.name for e in plan.quantized if cost.macs.get(e.name) and e.name in cost.input_elements]

    def _group(
        self,
        members: Sequence[tuple[Recipe, QuantizationMap]],
        float_bytes: int,
        dry_run: bool,
        tell: Callable[[str], None],
    ) -> list[Quantized]:
        """Quantize by recipes that share one session."""
        assert self.cost is not None  # noqa: S101 - `_plan` measured it
        recipe, plan = members[0]
        rows = frozenset(layer.name for layer in self.layers if layer.kind.layout(layer.module) is ROWS)
        session = Session(
            self.roots,
            self.layers,
            self.data,
            Budget(self.cost, self.most, self.memory_limit_bytes, rows, self._beside([r for r, _ in members])),
            recipe.collection(plan, self.layers, text_rule=self.text_rule),
            self.text_rule,
        )
        drafts = [Draft(session, plan, recipe.stages) for recipe, plan in members]
        footprints = [self._footprint(recipe, plan, session) for recipe, plan in members]
        if not dry_run:
            try:
                for draft in drafts:
                    prepare(draft)
                visit(session, drafts, propagate=recipe.propagate, progress=tell)
            finally:
                for draft in drafts:
                    draft.undo_changes()
        return [
            Quantized(
                None if dry_run else draft,
                QuantizationReport(
                    recipe=recipe.name,
                    map=draft.plan,
                    seconds=0.0,
                    float_bytes=float_bytes,
                    quantized_bytes=float_bytes if dry_run else _bytes_of(draft),
                    passes=passes,
                    memory_bytes=memory_bytes,
                    samples=self.samples,
                    layers=draft.results,
                    stages=draft.reports,
                    structure=tuple(draft.structure),
                ),
            )
            for draft, (recipe, _), (memory_bytes, passes) in zip(drafts, members, footprints, strict=True)
        ]

    def _beside(self, recipes: Sequence[Recipe]) -> dict[str, int]:
        """Return what fitting each layer takes besides copies of what it saw: the most that any of the stages does."""
        stages = [stage for recipe in recipes for stage in layer_stages(recipe.stages)]
        return {layer.name: max((s.workspace_bytes(layer) for s in stages), default=0) for layer in self.layers}

    def _footprint(self, recipe: Recipe, plan: QuantizationMap, session: Session) -> tuple[int, int]:
        """Predict (bytes stored beside the model, passes over the calibration set).

        Raises:
            CalibrationError: If the memory limit is below what is needed.
        """
        needs, passes = asked(recipe.stages), whole_passes(recipe.stages, fisher=recipe.objective == "fisher")
        if has_block_stages(recipe.stages):
            passes += len(block_steps(session.searched(plan), {layer.name: layer.tower for layer in self.layers}))
        if Need.OPERANDS in needs:
            storage = session.collection.storage(gradients=Need.GRADIENTS in needs)
            groups = session.budget.groups(session.searched(plan), storage)
            towers_of = {layer.name: layer.tower for layer in self.layers}
            for group in groups:
                if recipe.propagate != "none":
                    steps = len(group) if recipe.propagate == "layer" else len(blocks_side_by_side(group, towers_of))
                    passes += steps
            return max((session.budget.group_bytes(group, storage) for group in groups), default=0), passes + len(
                groups
            )
        needed = sum(_RANGE_BYTES * (1 + (entry.weight_bits is None)) for entry in plan.quantized)
        if self.memory_limit_bytes is not None and needed > self.memory_limit_bytes:
            raise CalibrationError(
                f"calibration needs {needed} bytes beside the model, the limit is {self.memory_limit_bytes}; "
                "raise memory_limit_gb"
            )
        return needed, passes


def _at_32_bits(tower: str) -> str:
    return f"{tower}_bits 32" if tower in TOWERS else f'widths {{"{tower}.*": float}}'


def _bytes_of(draft: Draft) -> int:
    """Return the size of a quantized network, for which it takes its place for a moment."""
    with draft.in_place():
        return sum(stored_bytes(root) for root in draft.session.roots.values())


def _measure(roots: Mapping[str, nn.Module], layers: Sequence[Layer], data: CalibrationSet) -> Profile:
    """Profile one batch of each kind, over all ranks; every rank gets the same."""
    own = [profile(roots, layers, data.forward, batch, count_samples(batch)) for batch in data.examples]
    found = [measured for profiles in gather(own) for measured in profiles]
    if not found:
        raise CalibrationError("the calibration set is empty; give at least one batch (calibration_samples >= 1)")
    return merged(found)


def _check_weights(roots: Mapping[str, nn.Module]) -> None:
    for root, module in roots.items():
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ModelError(f"expected finite weights, got NaN or Inf in {root}.{name}; load an intact checkpoint")


def _clip_forward(roots: Mapping[str, nn.Module]) -> Forward:
    clip = roots.get("clip")
    if clip is None or len(roots) > 1:
        raise ConfigError(f"networks named {', '.join(roots)} need a `forward` that runs them on a batch")

    def forward(batch: Batch) -> dict[str, Tensor]:
        images, texts = batch
        device = next(clip.parameters()).device
        outputs = {}
        if images is not None:
            outputs["image"] = nn.functional.normalize(encode_image(clip, images.to(device)), dim=-1)
        if texts is not None:
            outputs["text"] = nn.functional.normalize(encode_text(clip, texts.to(device)), dim=-1)
        return outputs

    return forward
