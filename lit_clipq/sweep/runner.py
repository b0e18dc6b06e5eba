"""Measure points: those that calibrate alike together, towers once for each of their widths."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby

import torch

from lit_clipq.analysis.caption_run import digest_of
from lit_clipq.analysis.measurement import Measurement, Scores
from lit_clipq.analysis.records import Identity, PointRecord, compare, scores_of
from lit_clipq.api import Progress, QuantizationReport, Quantized, planner
from lit_clipq.contracts import MeasuredTask, TwoTowerTask
from lit_clipq.errors import LitClipqError
from lit_clipq.nn.swap import FLOAT_BITS
from lit_clipq.recipes import BitWidths, Recipe
from lit_clipq.sweep.progress import SweepProgress
from lit_clipq.sweep.towers import TOWERS, TowerMemory, passes, tower_hashes

log = logging.getLogger(__name__)

Calibrate = Callable[[Sequence[Recipe], Progress], list[Quantized]]
"""Calibrates the networks of the run for several recipes at once."""


@dataclass(frozen=True)
class Point:
    """A point that can be measured."""

    id: str
    """Hash of everything that decides its numbers."""
    method: str
    """What the sweep calls its method."""
    group: int
    """Points of one group are calibrated together."""
    recipe: Recipe
    """What is done, as the options say it."""
    prepared: Callable[[], Recipe] = field(repr=False, compare=False)
    """Returns the recipe without what the task does not use; while the task is set up."""
    calibrate: Calibrate = field(repr=False, compare=False)
    """Calibrates for recipes of its group."""
    seed: int = 0
    """Of the choice of calibration samples."""


@dataclass(frozen=True)
class Records:
    """Makes the records of a run."""

    task: MeasuredTask
    """What is measured."""
    identity: Identity
    """What all records share."""
    versions: dict[str, str]
    """Of packages, and the device."""
    command: str
    """The command line."""

    def measured(
        self, point: Point, measured: Measurement, baseline: PointRecord, report: QuantizationReport
    ) -> PointRecord:
        """Return the record of a point that was measured."""
        record = replace(
            self._empty(point),
            calibration_samples=report.samples,
            metrics=measured.metrics,
            scores=_scores(measured.scores),
            samples=measured.samples,
            float_bytes=baseline.float_bytes,
            quantized_bytes=measured.bytes,
            float_macs_share=report.map.float_share,
            sqnr_db={name: layer.sqnr_db for name, layer in report.layers.items()},
        )
        return replace(record, differences=compare(baseline, record))

    def as_float(self, point: Point, baseline: PointRecord) -> PointRecord:
        """Return the record of a point that quantizes nothing: it is the float network."""
        same = replace(
            self._empty(point),
            metrics=baseline.metrics,
            scores=baseline.scores,
            samples=baseline.samples,
            float_bytes=baseline.float_bytes,
            quantized_bytes=baseline.float_bytes,
        )
        return replace(same, differences=compare(baseline, same))

    def float(self, measured: Measurement) -> PointRecord:
        """Return the record of the float network."""
        widths = BitWidths.resolve({"bits": FLOAT_BITS})
        return replace(
            self._blank(f"float-{digest_of(asdict(self.identity))[:16]}", widths),
            kind="float",
            metrics=measured.metrics,
            scores=_scores(measured.scores),
            samples=measured.samples,
            float_bytes=measured.bytes,
            quantized_bytes=measured.bytes,
        )

    def _empty(self, point: Point) -> PointRecord:
        blank = self._blank(point.id, point.recipe.bits)
        return replace(blank, method=point.method, seed=point.seed, quantize=point.recipe.to_json())

    def _blank(self, name: str, widths: BitWidths) -> PointRecord:
        task = self.task
        return PointRecord(
            id=name,
            kind="point",
            identity=self.identity,
            task=type(task).__name__,
            model=task.model_name,
            pretrained=task.pretrained,
            method=None,
            widths=widths.by_tower(),
            widths_in_words=widths.in_words(),
            seed=0,
            calibration_samples=0,
            quantize={},
            versions=self.versions,
            command=self.command,
        )

    def failed(self, point: Point, error: Exception) -> PointRecord:
        """Return the record of a point that failed."""
        return replace(self._empty(point), error=_told(error))


@dataclass(frozen=True)
class Bench:
    """What measures the networks of a run, as they are when it is asked to."""

    task: MeasuredTask
    """Holds the networks."""
    data: object
    """What they are evaluated on."""
    records: Records
    """Makes the records."""
    evaluate: Callable[[], None]
    """Runs the task over the evaluation set."""
    scoring: Callable[[], AbstractContextManager]
    """The state of torch in which the task scores."""
    float_measurement: Callable[[], Measurement]
    """Measures the float network, or remembers what it measured; before anything is quantized."""


class Runner:
    """Measures points and hands out their records, one by one.

    Args:
        bench: What measures.
        keep: Takes a record as soon as it is there; what it raises ends the sweep.
        progress: Is told of everything.
    """

    def __init__(self, bench: Bench, keep: Callable[[PointRecord], None], progress: SweepProgress) -> None:
        self.bench, self.progress, self.records = bench, progress, bench.records
        self._keep = keep
        self._memory = TowerMemory()
        self._float_towers: set[tuple[str, str]] = set()

    def run(self, points: Sequence[Point], baseline: PointRecord | None) -> None:
        """Measure the float network, unless that is done, and all points.

        Args:
            points: Those of one group follow each other.
            baseline: The record of the float network, where it is measured.
        """
        task = self.bench.task
        if baseline is None or (isinstance(task, TwoTowerTask) and task.uses_reference):
            self.progress.measuring("float")
            measured = self.bench.float_measurement()
            if baseline is None:
                baseline = self.records.float(measured)
                self._keep(baseline)
        for _, members in groupby(points, key=lambda point: point.group):
            self._group(list(members), baseline)

    # Points that are calibrated together

    def _group(self, points: Sequence[Point], baseline: PointRecord) -> None:
        plan = planner(self.bench.task.roots())
        active: list[Point] = []
        for point in points:
            try:
                planned = plan(point.prepared())
            except LitClipqError as error:
                self._failed(point, error)
                continue
            if planned.quantized:
                active.append(point)
            else:
                self._done(self.records.as_float(point, baseline))
        forms = self._calibrated(active) if active else {}
        hashes = self._run_towers(forms) if isinstance(self.bench.task, TwoTowerTask) else {}
        for point in active:
            if point.id not in forms:
                continue
            try:
                record = self._measured(point, forms.pop(point.id), hashes.get(point.id), baseline)
            except Exception as error:  # a point that fails is told, whatever it fails of
                self._failed(point, error)
            else:
                self._done(record)
        self._memory.forget_all_but(self._float_towers)

    def _calibrated(self, points: Sequence[Point]) -> dict[str, Quantized]:
        """Calibrate for all points at once; where that fails each alone, to learn which one it is."""
        try:
            made = points[0].calibrate([point.prepared() for point in points], self._layers(len(points)))
            return {point.id: form for point, form in zip(points, made, strict=True)}
        except Exception as error:
            _free_memory()
            if len(points) == 1:
                self._failed(points[0], error)
                return {}
            log.warning("calibrating for %d points at once failed (%s); each is tried alone", len(points), _told(error))
        return {name: form for point in points for name, form in self._calibrated([point]).items()}

    def _layers(self, points: int) -> Progress:
        return lambda name, done, total: self.progress.calibrating(points, name, done, total)

    # Single points

    def _run_towers(self, forms: Mapping[str, Quantized]) -> dict[str, dict[str, str]]:
        """Let each tower that is new run once; one that fails is left to the points that have it."""
        hashes = {}
        for name, form in forms.items():
            with form.installed() as report:
                hashes[name] = tower_hashes(self.bench.task.roots()["clip"])
            quantized = {entry.tower for entry in report.map.quantized}
            self._float_towers |= {(tower, hashes[name][tower]) for tower in TOWERS if tower not in quantized}
        chosen = passes(hashes, self._memory)
        for number, name in enumerate(chosen, start=1):
            self.progress.measuring(f"evaluating towers ({number} of {len(chosen)})")
            try:
                with forms[name].installed():
                    self._run_missing(hashes[name])
            except Exception as error:  # told by the points that need these towers, which try again
                log.warning("a pass over the evaluation set failed: %s", _told(error))
                _free_memory()
        return hashes

    def _run_missing(self, hashes: Mapping[str, str]) -> None:
        task = self.bench.task
        missing = self._memory.missing(hashes)
        if missing and isinstance(task, TwoTowerTask):
            task.run_towers(missing)
            self.bench.evaluate()
            self._memory.keep(hashes, task.kept_outputs())

    def _measured(
        self, point: Point, form: Quantized, hashes: Mapping[str, str] | None, baseline: PointRecord
    ) -> PointRecord:
        task = self.bench.task
        self.progress.measuring(f"{point.method} {point.recipe.bits.in_words()}, seed {point.seed}")
        with form.installed() as report:
            if hashes is not None and isinstance(task, TwoTowerTask):
                self._run_missing(hashes)
                with self.bench.scoring():
                    task.score_towers(self._memory.outputs(hashes))
            else:
                self.bench.evaluate()
            measured = Measurement.of(task, self.bench.data)
        return self.records.measured(point, measured, baseline, report)

    def _failed(self, point: Point, error: Exception) -> None:
        log.debug("point %s failed", point.id, exc_info=error)
        _free_memory()
        self._done(self.records.failed(point, error))

    def _done(self, record: PointRecord) -> None:
        self._keep(record)
        self.progress.point(record)


def _scores(scores: Mapping[str, Scores]) -> dict:
    return scores_of({name: (one.values, one.clusters) for name, one in scores.items()})


def _told(error: Exception) -> str:
    """Tell an error in one line; of one that is not this program's own also which kind it is."""
    message = " ".join(str(error).split())
    return message if isinstance(error, LitClipqError) else f"{type(error).__name__}: {message}"


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
