"""What a report is made of: measured points, read from results.json, results.jsonl and analysis.json files."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_clipq.analysis.records import FORMAT
from lit_clipq.errors import DataError
from lit_clipq.report.values import (
    Bounds,
    bounds,
    cosines,
    decibels,
    mistakes,
    number,
    numbers,
    parsed,
    sensitivity,
    whole,
    whole_numbers,
)

FLOAT_BITS = 32
NAMES = re.compile(r"results\.json|results(\.\d+-of-\d+)?\.jsonl|analysis\.json")
"""Files that are looked for in a folder; parts of a sweep are `results.1-of-4.jsonl`."""


@dataclass(frozen=True)
class Point:
    """One measured network. Metrics are fractions."""

    source: str
    """File, and line where it has several."""
    task: str
    model: str
    pretrained: str | None
    data: str
    """Tells data apart that is not told apart by N; empty where the file does not say."""
    method: str | None
    """Name of the recipe; `None` is the float network."""
    widths: Mapping[str, int]
    """`{vision,text,other}_{weight,activation}` in bits; empty for the float network."""
    patterns: str
    """Widths by pattern of layer names that come on top, in words; empty where there are none."""
    seed: int
    metrics: Mapping[str, float]
    float_metrics: Mapping[str, float]
    """Of the float network on the same data; empty where that is not known."""
    differences: Mapping[str, Bounds]
    """quantized - float with its 95 % interval."""
    samples: Mapping[str, int]
    float_bytes: int
    bytes: int
    calibration_samples: int
    float_macs_share: float
    sqnr_db: Mapping[str, float]
    """By layer, in order of the network."""
    versions: Mapping[str, str]
    command: str
    cosine: Mapping[str, Any] = field(default_factory=dict)
    mistakes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> tuple[str, str, str, str, str]:
        """What points must share to be compared: task, model, weights, data, N."""
        evaluated = {name: n for name, n in self.samples.items() if name in ("images", "captions", "questions")}
        return self.task, self.model, self.pretrained or "", self.data, json.dumps(evaluated, sort_keys=True)

    @property
    def vision(self) -> str:
        """Width of the image tower: `8`, or `W4A8` where weights and activations differ."""
        return self._width("vision")

    @property
    def text(self) -> str:
        """Width of the text tower."""
        return self._width("text")

    @property
    def label(self) -> str:
        """Method and widths in words."""
        if self.method is None:
            return "float"
        both = self.vision if self.vision == self.text else f"vision {self.vision}, text {self.text}"
        return f"{self.method} {both}{self.patterns}"

    def _width(self, tower: str) -> str:
        weight = self.widths.get(f"{tower}_weight", FLOAT_BITS)
        activation = self.widths.get(f"{tower}_activation", FLOAT_BITS)
        return str(weight) if weight == activation else f"W{weight}A{activation}"


@dataclass(frozen=True)
class Finding:
    """The sensitivity of one network, of an analysis.json."""

    source: str
    model: str
    method: str
    widths: str
    rows: Sequence[Mapping[str, Any]]
    """One for each layer and operand, in order of the network."""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    patterns: str = ""
    """What to leave float, or make wider, as flags."""


@dataclass
class Read:
    """Everything that was read."""

    points: list[Point] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What was left out, in one sentence each."""


def read_points(paths: Iterable[str | Path]) -> Read:
    """Read files, and folders for the files of the usual names in them.

    A last line of a results.jsonl that was cut short is left out and reported; so are points that failed.

    Args:
        paths: results.json, results.jsonl or analysis.json files, or folders.

    Raises:
        DataError: If nothing is there, or a file is damaged; names the file and the line.
    """
    found = Read()
    given = [Path(path) for path in paths]
    files = [file for path in given for file in _files(path)]
    for file in dict.fromkeys(files):
        if file.suffix == ".jsonl":
            _read_lines(file, found)
        else:
            _read_whole(file, found)
    if not found.points and not found.findings:
        told = f" ({'; '.join(found.problems)})" if found.problems else ""
        raise DataError(
            f"nothing to report: no result was found in {', '.join(map(str, given)) or 'no path'}{told}; give "
            "results.json or results.jsonl files, or folders that hold some"
        )
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if NAMES.fullmatch(file.name))
    if not path.is_file():
        raise DataError(f"there is no file or folder {path}; give results.json or results.jsonl files, or folders")
    return [path]


def _read_lines(file: Path, found: Read) -> None:
    content = _text(file)
    lines = content.split("\n")
    torn = lines.pop()  # empty where the last line ended
    if torn:
        found.problems.append(f"{file}, line {len(lines) + 1}: cut short, left out")
    records: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for at, line in enumerate(lines, start=1):
        try:
            record = parsed(line)
            if record.get("format", FORMAT) != FORMAT:
                raise ValueError(f"its format is {record['format']!r:.20}, this version reads {FORMAT}")
            if record.get("kind") not in ("float", "point"):
                raise ValueError("it has no `kind` float or point")
            records[str(record["id"])] = at, record  # of lines with the same id the last one counts
        except (ValueError, KeyError) as error:
            raise DataError(
                f"{file}, line {at} is not a result ({_why(error)}); give a results.jsonl of `lightning sweep`"
            ) from error
    baselines = {json.dumps(r.get("identity"), sort_keys=True): r for _, r in records.values() if r["kind"] == "float"}
    for line_number, record in records.values():
        place = f"{file}, line {line_number}"
        if record.get("error"):
            method = f"{record.get('method')} {record.get('widths_in_words', '')}".strip()
            found.problems.append(f"{place}: {method} failed: {record['error']}")
            continue
        try:
            baseline = baselines.get(json.dumps(record.get("identity"), sort_keys=True), {})
            found.points.append(_of_line(record, baseline, place))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place} is not a result ({_why(error)}); make it again with `lightning sweep`") from error


def _of_line(r: Mapping[str, Any], baseline: Mapping[str, Any], place: str) -> Point:
    is_float = r["kind"] == "float"
    identity = r.get("identity") or {}
    words = str(r.get("widths_in_words", ""))
    return Point(
        source=place,
        task=str(r["task"]),
        model=str(r["model"]),
        pretrained=None if r.get("pretrained") is None else str(r["pretrained"]),
        data=str(identity.get("data", "")),
        method=None if is_float else str(r["method"]),
        widths={} if is_float else whole_numbers(r["widths"]),
        patterns="" if is_float or " + " not in words else f" + {words.rpartition(' + ')[2]}",
        seed=whole(r.get("seed", 0)),
        metrics=numbers(r["metrics"]),
        float_metrics=numbers(baseline.get("metrics", {})),
        differences=bounds(r.get("differences", {})),
        samples=whole_numbers(r.get("samples", {})),
        float_bytes=whole(r.get("float_bytes", 0)),
        bytes=whole(r["float_bytes"] if is_float else r.get("quantized_bytes", 0)),
        calibration_samples=whole(r.get("calibration_samples", 0)),
        float_macs_share=number(r.get("float_macs_share", 1.0)),
        sqnr_db=decibels(r.get("sqnr_db", {})),
        versions={str(k): str(v) for k, v in r.get("versions", {}).items()},
        command=str(r.get("command", "")),
        cosine=cosines(r.get("cosine")),
        mistakes=mistakes(r.get("mistakes")),
    )


def _read_whole(file: Path, found: Read) -> None:
    try:
        record = parsed(_text(file))
        if "sensitivity" in record:
            found.findings.append(_finding(record, str(file)))
        else:
            found.points.extend(_of_run(record, str(file)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not a result ({_why(error)}); give a results.json of `lightning validate`, or an analysis.json"
        ) from error


def _finding(r: Mapping[str, Any], source: str) -> Finding:
    rows = [sensitivity(row) for row in r["sensitivity"]]
    versions = {str(k): str(v) for k, v in r.get("versions", {}).items()}
    told = r.get("patterns") or {}
    flags = [
        f"--quantize.{name} {shlex.quote(json.dumps(told[name]))}" for name in ("exclude", "widths") if told.get(name)
    ]
    return Finding(
        source=source,
        model=str(r["model"]),
        method=str(r["recipe"]),
        widths=str(r.get("widths", "")),
        rows=rows,
        command=str(r.get("command", "")),
        versions=versions,
        patterns="\nor\n".join(flags),
    )


def _of_run(r: Mapping[str, Any], source: str) -> list[Point]:
    """Return the float and, where there is one, the quantized point of a `results.json`."""
    metrics, size = r["metrics"], r["size_bytes"]
    layers = r.get("layers", {})
    shared: dict[str, Any] = {
        "source": source,
        "task": str(r["task"]),
        "model": str(r["model"]),
        "pretrained": None if r.get("pretrained") is None else str(r["pretrained"]),
        "data": "",
        "seed": whole(r.get("seed", 0)),
        "float_metrics": numbers(metrics["float"]),
        "samples": whole_numbers(r["samples"]),
        "float_bytes": whole(size["float"]),
        "versions": {str(k): str(v) for k, v in r.get("versions", {}).items()},
        "command": str(r.get("command", "")),
    }
    bits = r.get("bits") or {}
    patterns = len(((r.get("quantize") or {}).get("options") or {}).get("bits", {}).get("layers", ()))
    quantized = r.get("recipe") is not None and (patterns or any(b != FLOAT_BITS for b in bits.values()))
    baseline = Point(
        **shared, method=None, widths={}, patterns="", metrics=shared["float_metrics"], differences={},
        bytes=whole(size["float"]), calibration_samples=0, float_macs_share=1.0, sqnr_db={},
        cosine={} if quantized else cosines(r.get("cosine")),
    )  # fmt: skip
    if not quantized:
        return [baseline]
    return [
        baseline,
        Point(
            **shared,
            method=str(r["recipe"]),
            widths=whole_numbers(bits),
            patterns=f" + {patterns} pattern{'s' * (patterns != 1)}" if patterns else "",
            metrics=numbers(metrics["quantized"]),
            differences=bounds(metrics.get("difference", {})),
            bytes=whole(size["quantized"]),
            calibration_samples=whole(r.get("calibration_samples", 0)),
            float_macs_share=number(r.get("float_macs_share", 1.0)),
            sqnr_db=decibels({name: told["sqnr_db"] for name, told in layers.items() if "sqnr_db" in told}),
            cosine=cosines(r.get("cosine")),
            mistakes=mistakes(r.get("mistakes")),
        ),
    ]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); give JSON") from error


def _why(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else f"{error}"
