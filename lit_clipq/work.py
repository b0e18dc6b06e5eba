"""The work behind `lit_clipq.api`: recipes that share a collection are calibrated together, one draft each."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lit_clipq.calibration.batches import Batch, count_samples
from lit_clipq.calibration.budget import Budget
from lit_clipq.calibration.needs import Need
from lit_clipq.calibration.passes import CalibrationSet
from lit_clipq.calibration.profile import Profile, merged, profile
from lit_clipq.calibration.session import Collection, Session
from lit_clipq.distributed import check_same_on_all_ranks, gather
from lit_clipq.errors import CalibrationError, ConfigError, ModelError
from lit_clipq.models import fold_batchnorm, has_end_token_rule, make_explicit
from lit_clipq.nn.layout import ROWS
from lit_clipq.nn.size import stored_bytes
from lit_clipq.nn.swap import Layer, QuantizationMap, find_layers, towers
from lit_clipq.quantized import QuantizationReport, Quantized
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

Forward = Callable[[Batch], Any]
"""Runs the networks on a batch and returns what matters, a tensor or tensors by name."""
Progress = Callable[[str, int, int], None]
"""Told a layer that is done, how many are, and of how many."""

UNREACHED = "no calibration forward of the model reaches it"
_RANGE_BYTES = 8  # a float32 minimum and maximum


@dataclass
class Work:
    """The networks and the batches of one call, and what is measured once for all recipes."""

    roots: Mapping[str, nn.Module]
    batches: list[Batch]
    forward: Forward
    texts: Texts | None = None
    memory_limit_bytes: int | None = None

    def run(
        self, recipes: Sequence[Recipe], started: float, *, dry_run: bool, progress: Progress | None
    ) -> list[Quantized]:
        """Quantize by each of the recipes; see `quantize_many`.

        Args:
            recipes: What to do.
            started: When the call began, as `time.perf_counter` tells it.
            dry_run: Only plan and measure.
            progress: Told each layer that is done.

        Returns:
            One quantized form for each recipe.
        """
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
            collections = self._collections({number: recipes[number] for number in active}, plans)
            for number in active:
                groups.setdefault(self._shared(recipes[number], collections[number], number), []).append(number)
            tell = self._progress(progress, [[plans[number] for number in members] for members in groups.values()])
            for members in groups.values():
                begun = time.perf_counter() if found else started
                for number, result in zip(
                    members,
                    self._group(
                        [(recipes[n], plans[n]) for n in members], collections[members[0]], float_bytes, dry_run, tell
                    ),
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

    def _collections(
        self, recipes: Mapping[int, Recipe], plans: Mapping[int, QuantizationMap]
    ) -> dict[int, Collection]:
        """Return what is collected for each recipe.

        What is left out of texts does not matter to a recipe that leaves the text tower float: it shares the collection
        of one that does not, where there is one.
        """
        found = {n: recipe.collection(plans[n], self.layers, text_rule=self.text_rule) for n, recipe in recipes.items()}
        others = set(found.values())
        for number, collection in found.items():
            without_start = replace(collection, drop_start=True)
            if without_start in others and not any(entry.tower == "text" for entry in plans[number].quantized):
                found[number] = without_start
        return found

    def _shared(self, recipe: Recipe, collection: Collection, number: int) -> Any:
        """Return what recipes have in common that one collection serves."""
        alone = number if needs_one_draft(recipe.stages, recipe.propagate) else -1
        collected = asked(recipe.stages) & {need for need in Need if need.by_layer or need is Need.RANGES}
        return collection, collected, recipe.propagate, alone

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
        collection: Collection,
        float_bytes: int,
        dry_run: bool,
        tell: Callable[[str], None],
    ) -> list[Quantized]:
        """Quantize by recipes that share one session."""
        assert self.cost is not None  # noqa: S101 - `_plan` measured it
        recipe = members[0][0]
        rows = frozenset(layer.name for layer in self.layers if layer.kind.layout(layer.module) is ROWS)
        session = Session(
            self.roots,
            self.layers,
            self.data,
            Budget(self.cost, self.most, self.memory_limit_bytes, rows, self._beside([r for r, _ in members])),
            collection,
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
