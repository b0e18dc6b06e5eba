"""Lines of a `results.jsonl`: one measured point of a sweep each, with the scores that comparisons need.

A line is one JSON object, its `format` says which version. It holds no times and nothing else that two runs of the
same points would not share, so that an interrupted sweep and an uninterrupted one leave the same file.
"""

import base64
import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lit_clipq.analysis.comparison import Interval
from lit_clipq.errors import ConfigError, DataError
from lit_clipq.metrics.functional.bootstrap import paired_bootstrap

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the lines that are written here."""
_MOST_LEVELS = 256


@dataclass(frozen=True)
class PointScores:
    """One metric's score of every sample, in an order that all points of the same data share."""

    values: np.ndarray
    """float64 (n,)."""
    clusters: np.ndarray
    """int64 (n,): the picture of each sample."""


@dataclass(frozen=True)
class Identity:
    """What all points of one file share: hashes, short enough to be looked at."""

    code: str
    """Of this program's source and the versions of what its numbers depend on."""
    model: str
    """Of the weights, the checkpoint and the options of the task."""
    data: str
    """Of pictures, captions, labels and the options of the data module."""
    settings: str
    """Of limits on batches, precision and kind of device."""

    def differing(self, other: "Identity") -> list[str]:
        """Name what differs."""
        return [name for name in asdict(self) if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class PointRecord:
    """One point of a sweep: a method at some widths, calibrated on what one seed draws. Metrics are fractions."""

    id: str
    """Hash of identity, method, widths and calibration; one line for each in a finished file."""
    kind: Literal["float", "point"]
    """`float` is the unquantized baseline, which every file has once; `point` is a point of the grid."""
    identity: Identity
    """What the points of a file share."""
    task: str
    """Class of the task."""
    model: str
    """Model name as it was given."""
    pretrained: str | None
    """Tag or file of the weights."""
    method: str | None
    """Name of the recipe, or what the sweep calls a list of stages; `None` for the baseline."""
    widths: dict[str, int]
    """`vision_weight`, `vision_activation`, `text_weight`, `text_activation`, `other_weight`, `other_activation` in
    bits; 32 is float."""
    widths_in_words: str
    """The same in words, such as `vision W8A8, text W4A8`."""
    seed: int
    """Seed of the choice of calibration samples."""
    calibration_samples: int
    """Pictures that were calibrated on; 0 where nothing was."""
    quantize: dict[str, Any]
    """The recipe with its stages and options, as `Recipe.to_json` has it; empty for the baseline."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics by name; empty for a failed point."""
    differences: dict[str, Interval] = field(default_factory=dict)
    """quantized - float with bootstrap bounds, for metrics that are means over samples."""
    scores: dict[str, PointScores] = field(default_factory=dict)
    """Scores of single samples, for paired comparisons between any two points."""
    samples: dict[str, int] = field(default_factory=dict)
    """N: what was evaluated, and what was left out, by kind."""
    float_bytes: int = 0
    """Stored size of the float networks."""
    quantized_bytes: int = 0
    """Stored size of this point's networks: codes packed to their width, grids, and what stayed float."""
    float_macs_share: float = 1.0
    """Share of multiply-accumulates that stayed float."""
    sqnr_db: dict[str, float] = field(default_factory=dict)
    """Signal-to-noise ratio of each searched layer in dB."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else was learned of this point, plain values by name: `captions` of captioning, by the id of the picture."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of this package and those its numbers depend on."""
    command: str = ""
    """Command line that made it; empty where it was made from Python."""
    error: str | None = None
    """Why the point failed; its metrics are empty then."""

    def to_line(self) -> str:
        """Return the line of a file, without its end."""
        content = asdict(self) | {"scores": _packed(self.scores)}
        return json.dumps({"format": FORMAT, **content}, separators=(",", ":"), sort_keys=False)

    @classmethod
    def from_line(cls, line: str) -> "PointRecord":
        """Read a line.

        Raises:
            ValueError: If it is none, or has another format.
        """
        try:
            content = json.loads(line)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"expected a JSON object with `format` {FORMAT}")
        try:
            content["identity"] = Identity(**content["identity"])
            content["differences"] = {name: Interval(**value) for name, value in content["differences"].items()}
            content["scores"] = _unpacked(content["scores"])
            record = cls(**content)
            _check_types(record)
            return record
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError, zlib.error) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


_WORDS = ("id", "task", "model", "widths_in_words", "command")
_PERHAPS_WORDS = ("pretrained", "method", "error")
_COUNTS = ("seed", "calibration_samples", "float_bytes", "quantized_bytes")
_GROUPS: dict[str, tuple[type, ...]] = {
    "widths": (int,),
    "quantize": (object,),
    "metrics": (int, float),
    "samples": (int,),
    "sqnr_db": (int, float),
    "details": (object,),
    "versions": (str,),
}


def _check_types(record: PointRecord) -> None:
    """Check the values of a line, which anyone may have edited.

    Raises:
        ValueError: If one is of another type than `PointRecord` says.
    """
    kinds: list[tuple[str, tuple[type, ...]]] = [(name, (str,)) for name in _WORDS]
    kinds += [(name, (str, type(None))) for name in _PERHAPS_WORDS]
    kinds += [(name, (int,)) for name in _COUNTS] + [("float_macs_share", (int, float))]
    wrong = [name for name, kind in kinds if not isinstance(getattr(record, name), kind)]
    for name, kind in _GROUPS.items():
        group = getattr(record, name)
        if not isinstance(group, dict) or not all(isinstance(value, kind) for value in group.values()):
            wrong.append(name)
    wrong += [] if record.kind in ("float", "point") else ["kind"]
    wrong += [] if all(isinstance(value, str) for value in asdict(record.identity).values()) else ["identity"]
    bounds = [value for interval in record.differences.values() for value in asdict(interval).values()]
    wrong += [] if all(isinstance(value, int | float) for value in bounds) else ["differences"]
    wrong += [] if all(len(one.values) == len(one.clusters) for one in record.scores.values()) else ["scores"]
    if wrong:
        raise ValueError(f"its {', '.join(wrong)} cannot be what they are")


def read_records(*paths: Path) -> list[PointRecord]:
    """Read the points of one or several files, such as the shards of a sweep.

    Of lines with the same id the last one counts. A last line that was cut short, by a run that is being written or
    was killed, is left out with a warning.

    Args:
        *paths: Files of lines.

    Returns:
        Points in the order of their first lines.

    Raises:
        DataError: If a file is absent, or another line than the last is damaged or of another format.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "results.jsonl"
        ...     _ = path.write_text("")
        ...     read_records(path)
        []
    """
    found: dict[str, PointRecord] = {}
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"results cannot be read from {path}: {error}; give a results.jsonl of a sweep") from error
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            log.warning("%s ends in a line that was cut short; it is left out", path)
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                record = PointRecord.from_line(line.decode())
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: expected a point of a sweep ({error}); give a results.jsonl that this "
                    "version of `lightning sweep` wrote"
                ) from error
            found[record.id] = record
    return list(found.values())


def baseline_of(record: PointRecord, records: Iterable[PointRecord]) -> PointRecord | None:
    """Return the float point of the same model and data, or `None` where there is none."""
    same = (other for other in records if other.kind == "float" and other.identity == record.identity)
    return next(same, None)


def compare(first: PointRecord, second: PointRecord) -> dict[str, Interval]:
    """Compare two points picture by picture.

    Args:
        first: What is compared with.
        second: What is compared; may come from another file.

    Returns:
        second - first for each metric that both have scores of, with the bounds of
        `lit_clipq.metrics.functional.paired_bootstrap`.

    Raises:
        ConfigError: If they scored different samples.
    """
    intervals = {}
    for name in (name for name in first.scores if name in second.scores):
        one, other = first.scores[name], second.scores[name]
        if not np.array_equal(one.clusters, other.clusters):
            raise ConfigError(
                f"points {first.id} and {second.id} scored different samples of {name}; compare points of the same data"
            )
        before, after, pictures = map(torch.tensor, (one.values, other.values, one.clusters))
        intervals[name] = Interval(*paired_bootstrap(before, after, pictures))
    return intervals


# Scores as text: values that take few levels as one byte each, clusters as differences, both deflated


def _packed(scores: Mapping[str, PointScores]) -> dict[str, Any]:
    clusters: dict[str, int] = {}
    rows = {}
    for name, one in scores.items():
        place = clusters.setdefault(_deflated(np.diff(one.clusters.astype("<i8"), prepend=0)), len(clusters))
        levels, codes = np.unique(one.values, return_inverse=True)
        if len(levels) <= _MOST_LEVELS:
            rows[name] = {"clusters": place, "levels": levels.tolist(), "codes": _deflated(codes.astype("u1"))}
        else:
            rows[name] = {"clusters": place, "values": _deflated(one.values.astype("<f8"))}
    return {"clusters": list(clusters), "metrics": rows}


def _unpacked(content: Mapping[str, Any]) -> dict[str, PointScores]:
    clusters = [np.cumsum(_inflated(text, "<i8")) for text in content["clusters"]]
    scores = {}
    for name, row in content["metrics"].items():
        if "levels" in row:
            values = np.asarray(row["levels"], dtype=np.float64)[_inflated(row["codes"], "u1")]
        else:
            values = _inflated(row["values"], "<f8")
        scores[name] = PointScores(values, clusters[row["clusters"]])
    return scores


def _deflated(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 6)).decode("ascii")


def _inflated(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=kind)


def scores_of(values: Mapping[str, tuple[Sequence[float], Sequence[int]]]) -> dict[str, PointScores]:
    """Make scores of plain lists: (values, pictures) by metric name."""
    return {
        name: PointScores(np.asarray(rows, dtype=np.float64), np.asarray(clusters, dtype=np.int64))
        for name, (rows, clusters) in values.items()
    }
