"""Walk the stages of drafts that share one calibration: one pass for what several need, one visit of a layer."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

import torch

from lit_clipq.calibration.emulation import Parameters, emulated, holding, parameters_of, rounded_weight
from lit_clipq.calibration.needs import SPOILS, Need
from lit_clipq.calibration.observations import Observations
from lit_clipq.calibration.ranges import Ranges
from lit_clipq.calibration.session import Session
from lit_clipq.calibration.streams import in_turn
from lit_clipq.distributed import world_size
from lit_clipq.functional.granularity import Granularity
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.nn.swap import QuantizationMap
from lit_clipq.search.data import LayerData
from lit_clipq.stages.blocks import floats_of, has_block_stages, visit_blocks
from lit_clipq.stages.draft import Draft, frozen
from lit_clipq.stages.stage import ChoosingStage, FloatStage, GridStage, LayerStage, LayerTask, Stage

log = logging.getLogger(__name__)

Propagate = Literal["none", "layer", "block"]
"""What a layer is fitted behind: the float network, or the quantized layers or blocks in front of it."""
Progress = Callable[[str], None]


def asked(stages: Sequence[Stage]) -> frozenset[Need]:
    """Return all that stages ask for."""
    return frozenset(need for stage in stages for need in stage.asks())


def layer_stages(stages: Sequence[Stage]) -> tuple[LayerStage, ...]:
    """Return the stages that work on layers, in order."""
    return tuple(stage for stage in stages if isinstance(stage, LayerStage))


def whole_passes(stages: Sequence[Stage], *, fisher: bool) -> int:
    """Predict how often the whole calibration set runs beside the visits of layers."""
    known: set[Need] = set()
    passes = sum(stage.passes for stage in stages)
    for place, stage in enumerate(stages):
        if isinstance(stage, FloatStage | GridStage):
            missing = {need for need in _ahead(stages[place:]) if need.whole_set and not need.by_layer}
            missing -= known | {Need.RANGES}  # these come last, with the grids
            passes += bool(missing)
            known = (known | missing) - _spoiled_by(stage)
    needs = asked(stages)
    return passes + (Need.RANGES in needs) + (fisher and Need.GRADIENTS in needs)


def blocks_side_by_side(names: Sequence[str], tower_of: Mapping[str, str]) -> list[list[str]]:
    """Cut layers into steps: the first block of every tower, then the second, and so on, in order of the network.

    Layers that lie in the same member of a list of modules are one block; a layer outside of any is one by itself.

    Args:
        names: Layers in order of the network.
        tower_of: The tower of each.

    Example:
        >>> towers = {"a.0.x": "a", "a.0.y": "a", "a.head": "a", "b.0.x": "b"}
        >>> blocks_side_by_side(list(towers), towers)
        [['a.0.x', 'a.0.y', 'b.0.x'], ['a.head']]
    """
    towers: dict[str, list[tuple[str, list[str]]]] = {}
    for name in names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = name if place is None else ".".join(parts[: place + 1])
        steps = towers.setdefault(tower_of[name], [])
        if not steps or steps[-1][0] != block:
            steps.append((block, []))
        steps[-1][1].append(name)
    together = zip_longest(*([layers for _, layers in steps] for steps in towers.values()), fillvalue=[])
    return [[name for layers in step for name in layers] for step in together]


@torch.no_grad()
def prepare(draft: Draft) -> None:
    """Run the stages of a draft that come before its layers are visited."""
    for place, stage in enumerate(draft.stages):
        if isinstance(stage, FloatStage | GridStage):
            draft.session.prepare(_ahead(draft.stages[place:]))
            report = stage.rewrite(draft) if isinstance(stage, FloatStage) else stage.assign(draft)
            draft.reports[stage.name] = dict(report)
            if isinstance(stage, FloatStage) and stage.in_place:
                draft.session.wrote(stage.writes)


def _ahead(stages: Sequence[Stage]) -> set[Need]:
    """Return what the first of the stages asks for, and what the later ones do that nothing between them spoils."""
    needs: set[Need] = set()
    spoiled: set[Need] = set()
    for stage in stages:
        needs |= {need for need in stage.asks() if need not in spoiled}
        spoiled |= _spoiled_by(stage)
    return needs


def _spoiled_by(stage: Stage) -> set[Need]:
    """Return what was seen of the float network that does not hold any more behind a stage."""
    if not isinstance(stage, FloatStage) or not stage.in_place:
        return set()
    return {need for write in stage.writes for need in SPOILS[write]}


def visit(session: Session, drafts: Sequence[Draft], *, propagate: Propagate, progress: Progress) -> None:
    """Run the layer stages of drafts on the same observations, then freeze their layers.

    Args:
        session: The calibration that all of the drafts are made from.
        drafts: Prepared; they ask for the same. With `propagate` there is one.
        propagate: What a layer is fitted behind.
        progress: Told each layer that is done.
    """
    needs = asked(drafts[0].stages)
    names = _names(session, drafts)
    forms = {id(draft): _forms(draft) for draft in drafts}
    fitted = [form for draft in drafts for form in forms[id(draft)] or [draft]]
    ranges: dict[int, Ranges] = {}
    for draft in drafts:  # forms differ in widths only, and so see the same
        seen = _ranges(draft) if Need.RANGES in needs else {}
        ranges |= {id(form): seen for form in forms[id(draft)] or [draft]}
    visitor = _Visitor(session, fitted, ranges, progress, {id(form): {} for group in forms.values() for form in group})
    floats = {id(draft): floats_of(draft) for draft in drafts if has_block_stages(draft.stages)}
    if Need.OPERANDS not in needs:
        for name in names:
            visitor.keep(visitor.fit(name, None))
    elif propagate == "none":
        visitor.visit(names, gradients=Need.GRADIENTS in needs)
    else:
        visitor.visit_behind(names, propagate, gradients=Need.GRADIENTS in needs)
    for draft in drafts:
        if forms[id(draft)]:
            visitor.choose(draft, forms[id(draft)])
        for name in draft.modules:
            if session.layer[name].kind.is_table:
                visitor.keep_report(draft, visitor.fit_one(draft, name, None))
        if id(draft) in floats:
            visit_blocks(draft, floats[id(draft)])
        for name, module in draft.modules.items():
            frozen(module, name)


def chooser(stages: Sequence[Stage]) -> ChoosingStage | None:
    """Return the stage that has layers fitted in several ways, if there is one."""
    return next((stage for stage in stages if isinstance(stage, ChoosingStage)), None)


def _forms(draft: Draft) -> list[Draft]:
    """Return the drafts in which the layers of one are fitted before a stage chooses; none where no stage does."""
    choosing, forms = chooser(draft.stages), []
    for plan in choosing.plans(draft) if choosing is not None else ():
        form = draft.variant(plan)
        for stage in draft.stages:
            if isinstance(stage, GridStage):
                stage.assign(form)
        form.share_parameters(draft)
        forms.append(form)
    return forms


def _names(session: Session, drafts: Sequence[Draft]) -> list[str]:
    """Return the products that any of the drafts quantizes and a batch reaches, in order of the network."""
    wanted = {name for draft in drafts for name in session.searched(draft.plan)}
    return [layer.name for layer in session.layers if layer.name in wanted]


def _ranges(draft: Draft) -> Ranges:
    """Collect the ranges of all operands of a draft, with its channels as they are scaled."""
    operands: dict[str, dict[tuple[int, str], Granularity]] = {
        name: {
            (module.operands.index(operand), operand): quantizer.granularity
            for operand, quantizer in module.operand_quantizers.items()
        }
        for name, module in draft.modules.items()
    }
    with draft.scaled_in_place():
        return draft.session.ranges(operands)


@dataclass
class _Fitted:
    """A layer that was fitted: for each draft its Q-module and how it went."""

    name: str
    tasks: list[tuple[Draft, LayerTask]] = field(default_factory=list)


@dataclass
class _Visitor:
    session: Session
    drafts: Sequence[Draft]
    ranges: Mapping[int, Ranges]
    progress: Progress
    waiting: Mapping[int, dict[str, LayerTask]] = field(default_factory=dict)
    """Layers of drafts of which a stage is to choose, until it does."""

    def visit(self, names: Sequence[str], *, gradients: bool) -> None:
        """Visit layers with float inputs, in as few passes as the memory limit allows."""
        session = self.session
        for group in session.budget.groups(names, session.collection.storage(gradients=gradients)):
            seen = session.observe(group, gradients=gradients)
            jobs = [partial(self._fit_seen, name, seen) for name in group]
            alone = world_size() > 1 or session.budget.limit_bytes is not None
            for fitted in in_turn(jobs, session.device, together=not alone):
                self.keep(fitted)

    def _fit_seen(self, name: str, seen: dict[str, list[Observations]]) -> _Fitted:
        return self.fit(name, seen.pop(name))

    @torch.no_grad()
    def fit(self, name: str, seen: list[Observations] | None) -> _Fitted:
        """Fit one layer for every draft; drafts that want the same of it share the outcome."""
        fitted = _Fitted(name)
        done: dict[Any, LayerTask] = {}
        data: dict[str, LayerData] = {}
        drafts = [draft for draft in self.drafts if name in draft.modules]
        floats = {id(draft): _float_form(draft, name) for draft in drafts}
        waiting = set(floats.values())
        once = len({_in_json(layer_stages(draft.stages)) for draft in drafts}) == 1
        for draft in drafts:
            form = floats[id(draft)]
            key = form, json.dumps(draft.modules[name].config()), _in_json(draft.stages)
            if seen is not None and key in done:
                task = replace(done[key], draft=draft)
                draft.modules[name] = task.module
            else:
                if seen is not None and form in waiting:
                    waiting.remove(form)
                    scaling = draft.scaling.get(name)
                    own = list(seen) if scaling is None else [scaling.observed(o) for o in seen]
                    if not waiting:
                        seen.clear()  # what `LayerData` has no use for is freed
                    data[form] = LayerData(name, draft.modules[name], own, self.session.device, once=once)
                    own.clear()
                task = done[key] = self.fit_one(draft, name, data.get(form))
            fitted.tasks.append((draft, task))
        return fitted

    @torch.no_grad()
    def fit_one(self, draft: Draft, name: str, data: LayerData | None) -> LayerTask:
        """Run the layer stages of one draft on one layer."""
        ranges = dict(self.ranges.get(id(draft), {}))
        task = LayerTask(self.session.layer[name], draft.modules[name], draft, data, ranges)
        for stage in layer_stages(draft.stages):
            if task.layer.kind.is_table and not stage.tables:
                continue
            told = stage.fit(task)
            if told is not None:
                task.report[stage.name] = told
        return replace(task, observed=None)

    def keep(self, fitted: _Fitted) -> None:
        """Keep what was found for a layer, and tell that it is done."""
        for draft, task in fitted.tasks:
            if id(draft) in self.waiting:
                self.waiting[id(draft)][task.name] = task
            else:
                self._keep_task(draft, task)
        self.progress(fitted.name)

    def choose(self, draft: Draft, forms: Sequence[Draft]) -> None:
        """Let a draft take each layer as one of its forms has it."""
        choosing = chooser(draft.stages)
        assert choosing is not None  # noqa: S101 - it made the forms
        offers = [self.waiting[id(form)] for form in forms]
        chosen, report = choosing.choose(draft, offers)
        entries = {entry.name: entry for form in forms[:1] for entry in form.plan.entries}
        for name, number in chosen.items():
            task = offers[number][name]
            told = {stage: what for stage, what in task.report.items() if stage != choosing.name}
            task = replace(task, draft=draft, report=told)
            draft.modules[name] = task.module
            entries[name] = next(entry for entry in forms[number].plan.entries if entry.name == name)
            self._keep_task(draft, task)
        draft.plan = QuantizationMap(tuple(entries.values()))
        draft.reports[choosing.name] = dict(report)

    def _keep_task(self, draft: Draft, task: LayerTask) -> None:
        self.keep_report(draft, task)
        if task.result is not None:
            result = draft.results[task.name] = task.result
            log.info("%s: %.4g -> %.4g, %.1f dB", task.name, result.before, result.after, result.sqnr_db)

    @staticmethod
    def keep_report(draft: Draft, task: LayerTask) -> None:
        """Keep what stages said of a layer, and what they added to it."""
        draft.structure += task.structure
        for stage_name, told in task.report.items():
            draft.reports.setdefault(stage_name, {})[task.name] = told

    def visit_behind(self, names: Sequence[str], propagate: Propagate, *, gradients: bool) -> None:
        """Visit layers behind the quantized layers or blocks in front of them; gradients and targets stay exact."""
        (draft,) = self.drafts
        session, modules = self.session, draft.modules
        rounded: dict[str, Parameters] = {}
        floats: dict[str, Parameters] = {}
        towers = {layer.name: layer.tower for layer in session.layers}
        everything = [[name] for name in names] if propagate == "layer" else blocks_side_by_side(names, towers)
        step_of = {name: number for number, step in enumerate(everything) for name in step}
        done: list[str] = []
        with draft.in_place():
            for group in session.budget.groups(names, session.collection.storage(gradients=gradients)):
                with holding({name: modules[name] for name in done}, floats):
                    exact = session.observe(group, gradients=gradients, modules=modules)
                for number in sorted({step_of[name] for name in group}):
                    step = [name for name in group if step_of[name] == number]
                    before = {name: modules[name] for name in done if step_of[name] < number}
                    with holding({name: modules[name] for name in done}, floats), emulated(before, rounded):
                        actual = session.observe(step, gradients=False, modules=modules)
                    for name in step:
                        module = modules[name]
                        seen = _with_targets(module, exact.pop(name), actual.pop(name))
                        floats[name] = parameters_of(module)
                        data = LayerData(name, module, seen, session.device, once=True)
                        self.keep(_Fitted(name, [(draft, self.fit_one(draft, name, data))]))
                        if isinstance(module, QWeighted):
                            rounded[name] = rounded_weight(module), module.bias
                    done += step


def _in_json(stages: Sequence[Stage]) -> str:
    """Return names and options of stages as text that tells them apart."""
    return json.dumps([[stage.name, stage.options()] for stage in stages], default=repr)


def _float_form(draft: Draft, name: str) -> str:
    """Return what tells apart the float weights and the observations that drafts have of a layer."""
    scaling = draft.scaling.get(name)
    scaled = "" if scaling is None else repr([x.tolist() for x in scaling.tensors()])
    before = [stage for stage in draft.stages if isinstance(stage, FloatStage | GridStage)]
    return scaled + (_in_json(before) if draft.changes_weights(name) else "")


def _with_targets(module: QModule, exact: Sequence[Observations], actual: Sequence[Observations]) -> list[Observations]:
    """Return what a layer sees behind quantized layers, with the products and gradients of the float network."""
    return [
        replace(have, weight=want.weight, target=module.product(*(x.float() for x in want.inputs)))
        for want, have in zip(exact, actual, strict=True)
    ]


def needs_one_draft(stages: Sequence[Stage], propagate: Propagate) -> bool:
    """Whether drafts of these stages cannot share a session with others."""
    return propagate != "none" or any(isinstance(stage, FloatStage) and stage.in_place for stage in stages)
