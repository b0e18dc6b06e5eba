"""The analysis: calibrate once, predict for every operand, measure for what is asked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lit_clipq.api import Forward, Progress, QuantizationReport, Quantized, quantize_many
from lit_clipq.calibration.batches import Batch
from lit_clipq.distributed import world_size
from lit_clipq.errors import ConfigError
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.start_token import StartTokenAverage, StartTokenScores
from lit_clipq.nn.swap import MapEntry, swap, unswap
from lit_clipq.recipes import Recipe
from lit_clipq.sensitivity.activations import OutlierObserver
from lit_clipq.sensitivity.patterns import Patterns, worth_leaving
from lit_clipq.sensitivity.replay import Replay, block_of, relative_error, relevant
from lit_clipq.sensitivity.rows import Row, Scope
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.sensitivity import ALL, Sensitivity
from lit_clipq.text_lengths import Texts

Measured = Callable[[str, int, int], None]
"""Told what was measured, how many are, and of how many."""


@dataclass(frozen=True)
class Analysis:
    """What quantizing each layer, block, tower and operand costs."""

    recipe: str
    widths: str
    """In words."""
    rows: tuple[Row, ...]
    """Towers, blocks, layers and operands, in order of the network."""
    ranges: tuple[Mapping[str, Any], ...]
    """Of what every linear layer reads: range, largest channels and tokens, largest over median magnitude."""
    sinks: tuple[Mapping[str, Any], ...]
    """The mean attention on the first token, of every attention."""
    samples: int
    seconds: float
    """Of calibration and prediction."""
    share: float = 0.5
    """What share of the predicted error `patterns` remove."""

    @property
    def patterns(self) -> Patterns:
        """What to leave float, or make wider."""
        return worth_leaving(self.rows, self.share)

    def worst(self, count: int) -> list[Row]:
        """Return the layers of the highest prediction."""
        return sorted((row for row in self.rows if row.scope == "layer"), key=lambda row: -row.predicted)[:count]

    def to_json(self) -> dict[str, Any]:
        """Return the content of an `analysis.json`, as far as the library knows it."""
        patterns = self.patterns
        return {
            "recipe": self.recipe,
            "widths": self.widths,
            "samples": self.samples,
            "seconds": self.seconds,
            "sensitivity": [row.to_json() for row in self.rows],
            "ranges": [dict(row) for row in self.ranges],
            "attention_on_first": [dict(row) for row in self.sinks],
            "patterns": {
                "share": patterns.share,
                "exclude": list(patterns.exclude),
                "widths": dict(patterns.widths),
            },
        }


@dataclass
class Placed:
    """The network of an analysis, with single layers quantized while a context is open.

    Attributes:
        quantized: What was calibrated.
    """

    quantized: Quantized
    _whole: dict[str, nn.ModuleDict] = field(default_factory=dict)

    @property
    def draft(self) -> Draft:
        """The finished draft."""
        return self.quantized.draft

    @property
    def report(self) -> QuantizationReport:
        """What was calibrated."""
        return self.quantized.report

    @property
    def starts(self) -> dict[str, QModule]:
        """Products with the start token as a constant: without it, layers in front of them cannot be quantized."""
        kinds = (StartTokenScores, StartTokenAverage)
        return {name: module for name, module in self.draft.modules.items() if isinstance(module, kinds)}

    @contextmanager
    def rewritten(self) -> Iterator[None]:
        """Let the float network be as the recipe rewrote it (the same function), while the context is open.

        Products that keep the start token as a constant round nothing meanwhile, so that they can stand in their place.
        """
        draft = self.draft
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            for do, undo in draft.changes:
                stack.callback(undo)
                do()
            stack.enter_context(draft.scaled_in_place())
            for name, module in self.starts.items():
                self._whole[name] = module.input_quantizers
                stack.callback(setattr, module, "input_quantizers", module.input_quantizers)
                module.input_quantizers = nn.ModuleDict()
            yield

    @contextmanager
    def alone(self, names: Iterable[str]) -> Iterator[None]:
        """Let only these layers be quantized, while the context is open."""
        session = self.draft.session
        with self.rewritten(), ExitStack() as stack:
            chosen = {name: stack.enter_context(self.only(name, ALL)) for name in names}
            modules = {**self.starts, **chosen}
            swap(session.roots, [session.layer[name] for name in modules], lambda layer: modules[layer.name])
            stack.callback(unswap, session.roots, session.layers, modules)
            yield

    @contextmanager
    def only(self, name: str, operand: str) -> Iterator[QModule]:
        """Let a frozen Q-module round one of its operands only, or all; inside of `rewritten`."""
        module = self.draft.modules[name]
        before, weight = module.input_quantizers, module._buffers.get("weight")
        whole = self._whole.get(name, before)
        try:
            module.input_quantizers = nn.ModuleDict({n: q for n, q in whole.items() if operand in (n, ALL)})
            if weight is not None and operand not in ("weight", ALL):
                module._buffers["weight"] = self.draft.session.layer[name].module.get_parameter("weight").detach()
            yield module
        finally:
            module.input_quantizers = before
            if weight is not None:
                module._buffers["weight"] = weight


def analyze(
    model: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    forward: Forward | None = None,
    texts: Texts | None = None,
    measure: int = 16,
    left_float: int = 0,
    blocks: bool = True,
    share: float = 0.5,
    memory_limit_bytes: int | None = None,
    progress: Progress | None = None,
    measured: Measured | None = None,
) -> tuple[Analysis, Placed]:
    """Say what quantizing each layer, block, tower and operand by a recipe costs the embeddings.

    Grids are calibrated once. For every operand alone the error of its layer's product times Gauss-Newton weights, on
    the observations that the grids were found on, predicts the squared relative error of the embedding: with J the
    Jacobian of the outputs y by the product and e its error, `sum_ij J_ij^2 e_j^2 / sum_i y_i^2`. For the layers and
    operands of the highest prediction the rest of the network is run. The network stays float.

    Args:
        model: As for `lit_clipq.quantize`.
        batches: As for `lit_clipq.quantize`; 32 pairs are enough to rank layers.
        recipe: Its widths are those that are analysed.
        forward: As for `lit_clipq.quantize`.
        texts: As for `lit_clipq.quantize`.
        measure: For how many layers, and as many operands, the error is measured as well; -1 for all.
        left_float: For how many layers the tower is also measured with all quantized but this one; -1 for all.
        blocks: Whether every block and tower is measured.
        share: What share of the predicted error the patterns are to remove.
        memory_limit_bytes: As for `lit_clipq.quantize`.
        progress: Told of the layers of the calibration.
        measured: Told of the measurements.

    Returns:
        The analysis, and the network with what was calibrated, to evaluate single layers.

    Raises:
        ConfigError: For a recipe whose objective or order gives no prediction, or that quantizes nothing; for several
            processes.
        CalibrationError: As for `lit_clipq.quantize`.
    """
    _check(recipe)
    stages = (*recipe.stages, Sensitivity())
    (quantized,) = quantize_many(
        model, batches, [replace(recipe, stages=stages)], forward=forward, texts=texts,
        memory_limit_bytes=memory_limit_bytes, progress=progress,
    )  # fmt: skip
    placed = Placed(quantized)
    draft = placed.draft
    session, told = draft.session, quantized.report.stages["sensitivity"]
    observer = OutlierObserver(session)
    towers = {layer.name: layer.tower for layer in session.layers}
    with torch.inference_mode(False), torch.no_grad():
        session.run([observer])
    with placed.rewritten():
        base = Replay(session, towers, placed.starts)
        rows = _predicted(placed, told, base)
        rows = _measured(placed, base, rows, measure=measure, left_float=left_float, blocks=blocks, tell=measured)
    analysis = Analysis(
        recipe.name, recipe.bits.in_words(), tuple(rows), tuple(observer.found()), tuple(observer.sinks()),
        quantized.report.samples, quantized.report.seconds, share,
    )  # fmt: skip
    worth_leaving(rows, share)
    return analysis, placed


def _check(recipe: Recipe) -> None:
    if recipe.objective != "gauss_newton" or recipe.propagate != "none" or recipe.token_share != 1:
        raise ConfigError(
            "the analysis predicts from Gauss-Newton weights of all tokens behind the float network; leave out the "
            "options objective, propagate and token_share"
        )
    if recipe.bits.all_float():
        raise ConfigError("the analysis was given 32 bits, where there is nothing to analyse; give --quantize.bits 8")
    if world_size() > 1:
        raise ConfigError("the analysis runs in one process; leave out --trainer.devices")


def _predicted(placed: Placed, told: Mapping[str, Any], base: Replay) -> list[Row]:
    """Return rows of towers, blocks, layers and operands with their predictions, in order of the network."""
    draft = placed.draft
    entries = {entry.name: entry for entry in draft.plan.entries}
    signal: dict[str, float] = {}
    for tower in {entry.tower for entry in entries.values()}:
        signal[tower] = sum(
            (value.double().square().sum() / max(value[0].numel(), 1)).item()
            for outputs in base.outputs
            for name, value in outputs.items()
            if name in relevant(tower, outputs)
        )
    rows: list[Row] = []
    for layer in draft.session.layers:
        if layer.name in told:
            rows += _of_layer(entries[layer.name], told[layer.name], signal[layer.tower] or 1.0)
    totals: dict[str, float] = {}
    for one in rows:
        totals[one.tower] = totals.get(one.tower, 0.0) + (one.predicted if one.scope == "layer" else 0.0)
    groups = [_sum("tower", tower, tower, [r for r in rows if r.tower == tower]) for tower in totals]
    by_block: dict[str, list[Row]] = {}
    for one in rows:
        by_block.setdefault(block_of(one.layer) or "", []).append(one)
    groups += [_sum("block", block, own[0].tower, own) for block, own in by_block.items() if block]
    return [replace(r, share=r.predicted / totals[r.tower] if totals[r.tower] else 0.0) for r in (*groups, *rows)]


def _of_layer(entry: MapEntry, errors: Mapping[str, Mapping[str, float]], signal: float) -> list[Row]:
    """Return the row of a layer, and one for each of its quantized operands."""
    width = {name: entry.weight_bits or 0 if name == "weight" else entry.activation_bits for name in errors}
    narrowest = min(bits for name, bits in width.items() if name != ALL)
    whole = errors.get(ALL) or next(iter(errors.values()))

    def row(scope: Scope, operand: str, bits: int, value: Mapping[str, float]) -> Row:
        predicted = value["weighted"] / signal
        return Row(scope, entry.name, entry.tower, operand, bits, predicted, 0.0, value.get("sqnr_db"))

    operands = [row("operand", name, width[name], value) for name, value in errors.items() if name != ALL]
    return [row("layer", ALL, narrowest, whole), *operands]


def _sum(scope: Scope, name: str, tower: str, rows: Sequence[Row]) -> Row:
    layers = [row for row in rows if row.scope == "layer"]
    return Row(scope, name, tower, ALL, min(r.bits for r in layers), sum(r.predicted for r in layers), 0.0)


def _measured(
    placed: Placed,
    base: Replay,
    rows: Sequence[Row],
    *,
    measure: int,
    left_float: int,
    blocks: bool,
    tell: Measured | None,
) -> list[Row]:
    """Run the rest of the network for what is asked."""
    wanted = {scope: _top(rows, scope, measure) for scope in ("layer", "operand")}
    wanted |= {scope: [r for r in rows if r.scope == scope] if blocks else [] for scope in ("block", "tower")}
    alone = [row for scope in ("tower", "block", "layer", "operand") for row in wanted[scope]]
    but_one = _top(rows, "layer", left_float)
    found: dict[tuple[str, str, str], float] = {}
    without: dict[tuple[str, str, str], float] = {}
    members = _members(rows)
    total, done = len(alone) + len(but_one), 0
    for row in alone:
        with ExitStack() as stack:
            changed: dict[str, QModule | None] = {
                name: stack.enter_context(placed.only(name, row.operand)) for name in members[row.scope, row.layer]
            }
            found[_key(row)] = relative_error(base.run(changed), base.outputs, row.tower)
        done += 1
        _tell(tell, row, done, total)
    for tower in dict.fromkeys(row.tower for row in but_one):
        with ExitStack() as stack:
            whole = {name: stack.enter_context(placed.only(name, ALL)) for name in members["tower", tower]}
            behind = Replay(base.session, base.towers, {**placed.starts, **whole})
            for row in (row for row in but_one if row.tower == tower):
                without[_key(row)] = relative_error(behind.run({row.layer: None}), base.outputs, tower)
                done += 1
                _tell(tell, row, done, total)
    return [replace(r, embedding=found.get(_key(r)), left_float=without.get(_key(r))) for r in rows]


def _members(rows: Sequence[Row]) -> dict[tuple[str, str], list[str]]:
    """Return the layers of each tower, block, layer and operand."""
    members: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.scope == "layer":
            for key in (("tower", row.tower), ("block", block_of(row.layer) or ""), ("layer", row.layer)):
                members.setdefault(key, []).append(row.layer)
            members["operand", row.layer] = [row.layer]
    return members


def _top(rows: Sequence[Row], scope: str, count: int) -> list[Row]:
    own = sorted((row for row in rows if row.scope == scope), key=lambda row: -row.predicted)
    return own if count < 0 else own[:count]


def _key(row: Row) -> tuple[str, str, str]:
    return row.scope, row.layer, row.operand


def _tell(tell: Measured | None, row: Row, done: int, total: int) -> None:
    if tell is not None:
        tell(f"{row.layer} {row.operand}", done, total)
