"""From options to points, and from points to the lines of a file."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from lit_clipq.analysis.caption_run import digest_of
from lit_clipq.analysis.records import Identity
from lit_clipq.contracts import Calibrating, MeasuredTask
from lit_clipq.errors import ConfigError, LitClipqError
from lit_clipq.recipes import Recipe
from lit_clipq.sweep.file import ResultsFile
from lit_clipq.sweep.options import SweepOptions, grid_of, shard_of
from lit_clipq.sweep.runner import Point

SweepCallback = Calibrating[Recipe]
"""The callback that quantizes, with this program's recipes."""


class PointsFailedError(LitClipqError):
    """Some points of a sweep failed; the others are measured."""


def require_sweepable(callback: object, processes: int, *, resume: bool) -> SweepCallback:
    """Return the callback of a run, if the run can be a sweep.

    Raises:
        ConfigError: If there is none, for options that mean nothing for a sweep, or several processes.
    """
    if not isinstance(callback, Calibrating):
        raise ConfigError("a sweep needs the callback `callbacks.Quantize`, which says what its grid leaves open")
    if processes > 1:
        raise ConfigError(
            f"a sweep measures on one device, but this run has {processes} processes; give --trainer.devices 1, and "
            "--sweep.engine ray or --sweep.shard to use more"
        )
    if resume:
        raise ConfigError("a sweep always goes on with what its results file lacks; leave out --resume")
    callback.check_sweepable()
    return callback


def identity_of(parts: Mapping[str, Any], versions: Mapping[str, str]) -> Identity:
    """Return what the points of a run share.

    Args:
        parts: What decides a float measurement, by name, as the Trainer tells it.
        versions: Of packages.
    """
    model = {name: parts[name] for name in ("model", "checkpoint", "task", "roots", "options")}
    return Identity(
        code=digest_of({"source": source_hash(), "versions": dict(versions)})[:16],
        model=digest_of(model)[:16],
        data=str(parts["data"])[:16],
        settings=digest_of({name: parts[name] for name in ("limit", "precision")})[:16],
    )


@lru_cache
def source_hash() -> str:
    """Hash the source of this program."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=16)
    for folder in (package, package.parent / "callbacks", package.parent / "datamodules"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(package.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def points_of(
    options: SweepOptions, callback: SweepCallback, task: MeasuredTask, trainer: Any, identity: Identity
) -> list[Point]:
    """Make the points of a grid, or of its part that is asked for.

    Args:
        options: The grid.
        callback: Says everything that the grid leaves open.
        task: The task.
        trainer: Of the run.
        identity: What the points share.

    Raises:
        ConfigError: For a point that no run could have, such as a width of 1 bit, or a grid without a method.
    """
    grid = grid_of(options)
    part = options.part()
    if part is not None:
        grid = shard_of(grid, *part)
    if not grid:
        raise ConfigError(f"sweep.shard {options.shard} has no point: the grid is smaller; give fewer parts")
    numbers: dict[Any, int] = {}
    points = []
    for place in grid:
        at = callback.at(**place.options)
        if at.recipe is None:
            raise ConfigError("a sweep needs a method: give --sweep.recipes, --sweep.stages or --quantize.recipe")
        name = place.method or at.recipe.name
        points.append(
            Point(
                id=digest_of({"identity": asdict(identity), "method": name, "run": at.fingerprint()})[:16],
                method=name,
                group=numbers.setdefault(place.group, len(numbers)),
                recipe=at.recipe,
                prepared=partial(at.recipe_for, task),
                seed=at.seed,
                calibrate=partial(_calibrate, at, trainer, task),
            )
        )
    return points


def _calibrate(at: SweepCallback, trainer: Any, task: MeasuredTask, recipes: Sequence[Recipe], progress: Any) -> Any:
    return at.calibrate(trainer, task, recipes, progress)


def shard_path(path: Path, options: SweepOptions) -> Path:
    """Return the file of a part of a sweep: `results.2-of-4.jsonl` for `results.jsonl`."""
    part = options.part()
    return path if part is None else path.with_name(f"{path.stem}.{part[0]}-of-{part[1]}{path.suffix}")


@contextmanager
def results_file(
    path: Path, identity: Identity, points: Sequence[Point], *, mix: bool
) -> Iterator[tuple[ResultsFile, list[Point]]]:
    """Open the file of a sweep; gives it and the points that it lacks. In the end it is put in order.

    Raises:
        ConfigError: As for `ResultsFile`.
        PointsFailedError: If any of the points failed, now or in a run before.
    """
    with ResultsFile(path, identity, mix=mix) as file:
        yield file, [point for point in points if not file.has(point.id)]
        baseline = file.baseline
        first = [] if baseline is None else [baseline.id]
        file.put_in_order({name: place for place, name in enumerate([*first, *(point.id for point in points)])})
        failed = [record for record in file.records(point.id for point in points) if record.error is not None]
    if failed:
        raise PointsFailedError(
            f"{len(failed)} of {len(points)} points failed, the first of them {failed[0].method} "
            f"{failed[0].widths_in_words} with seed {failed[0].seed}: {failed[0].error}; all errors are in {path}, and "
            "the same command tries these points again"
        )
