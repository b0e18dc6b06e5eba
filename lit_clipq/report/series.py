"""The numbers behind each figure: plain values, computed from points and nothing else."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_clipq.report.points import Finding, Point

BOTH = "both towers"
MAIN = ("recall@1_i2t", "recall@1_t2i", "top1", "cider", "vqa_accuracy", "accuracy", "overall")
"""Metrics that are drawn, where there are any of them; all metrics stand in the tables."""


@dataclass(frozen=True)
class Spread:
    """One value over calibration seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Take mean, minimum and maximum."""
        return cls(math.fsum(values) / len(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Curve:
    """Accuracy against widths."""

    method: str
    varied: str
    """What the widths are of: both towers, vision alone, text alone."""
    widths: tuple[str, ...]
    values: tuple[Spread, ...]


@dataclass(frozen=True)
class HeatMap:
    """Accuracy at every pair of widths, `None` where there is no point."""

    method: str
    vision: tuple[str, ...]
    text: tuple[str, ...]
    values: tuple[tuple[Spread | None, ...], ...]
    """By row of `vision`."""


@dataclass(frozen=True)
class Difference:
    """quantized - float of one method at some widths, over seeds."""

    label: str
    method: str
    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Sized:
    """Size against accuracy."""

    label: str
    method: str
    megabytes: float
    value: float
    best: bool
    """Whether no other point is smaller and at least as good, or as small and better."""


def by_setting(points: Iterable[Point]) -> dict[tuple[str, ...], list[Point]]:
    """Group points that may be compared, in order of appearance."""
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    return groups


def main_metrics(points: Sequence[Point]) -> list[str]:
    """Name the metrics to draw: the well-known ones, or else the first."""
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    return [name for name in MAIN if name in names] or names[:1]


def float_value(points: Sequence[Point], metric: str) -> float | None:
    """Return a metric of the float network."""
    for point in points:
        if point.method is None and metric in point.metrics:
            return point.metrics[metric]
    return next((point.float_metrics[metric] for point in points if metric in point.float_metrics), None)


def width_order(width: str) -> tuple[float, str]:
    """Order widths from wide to narrow.

    Example:
        >>> sorted(["4", "32", "W4A8", "8"], key=width_order)
        ['32', '8', 'W4A8', '4']
    """
    numbers = [int(n) for n in re.findall(r"\d+", width)]
    return -sum(numbers) / max(len(numbers), 1), width


def curves(points: Sequence[Point], metric: str) -> list[Curve]:
    """Return accuracy against widths of both towers together and of each alone, float as width 32 included.

    A method has a curve where it was measured at two widths or more.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    baseline = float_value(points, metric)
    varied = {
        BOTH: lambda p: p.vision == p.text,
        "vision alone": lambda p: p.text == "32" != p.vision,
        "text alone": lambda p: p.vision == "32" != p.text,
    }
    for point in points:
        if point.method is None or metric not in point.metrics or point.patterns:
            continue
        for name, fits in varied.items():
            if fits(point):
                width = point.text if name == "text alone" else point.vision
                found.setdefault((point.method, name), {}).setdefault(width, []).append(point.metrics[metric])
    told = []
    for key, by_width in found.items():
        if len(by_width) > 1:
            if baseline is not None:
                by_width.setdefault("32", [baseline])
            widths = tuple(sorted(by_width, key=width_order))
            told.append(Curve(*key, widths, tuple(Spread.of(by_width[width]) for width in widths)))
    return told


def methods_of(points: Sequence[Point]) -> list[str]:
    """Name the methods in order of appearance, so that all figures give them the same colour."""
    return list(dict.fromkeys(point.method for point in points if point.method is not None))


def heat_maps(points: Sequence[Point], metric: str) -> list[HeatMap]:
    """Return a map for each method with at least two widths of either tower, seeds averaged, float at 32 and 32."""
    cells: dict[str, dict[tuple[str, str], list[float]]] = {}
    baseline = float_value(points, metric)
    for point in points:
        if point.method is not None and metric in point.metrics and not point.patterns:
            value = point.metrics[metric]
            cells.setdefault(point.method, {}).setdefault((point.vision, point.text), []).append(value)
    maps = []
    for method, values in cells.items():
        if baseline is not None and any("32" in pair for pair in values):
            values.setdefault(("32", "32"), [baseline])
        vision, text = (tuple(sorted({pair[i] for pair in values}, key=width_order)) for i in (0, 1))
        if len(vision) > 1 and len(text) > 1 and len(values) > max(len(vision), len(text)):
            rows = tuple(tuple(Spread.of(values[v, t]) if (v, t) in values else None for t in text) for v in vision)
            maps.append(HeatMap(method, vision, text, rows))
    return maps


def differences(points: Sequence[Point], metric: str, most: int = 24) -> list[Difference]:
    """Return differences to float with their intervals; of several seeds the mean, and the envelope of the intervals.

    Where there are more than `most`, those of one width in both towers are returned, as far as there are any.

    Args:
        points: Of one setting.
        metric: Which.
        most: So many at most, from wide to narrow.
    """
    groups: dict[str, list[Point]] = {}
    for point in points:
        if metric in point.differences:
            groups.setdefault(point.label, []).append(point)
    alike = {label: members for label, members in groups.items() if members[0].vision == members[0].text}
    groups = alike if len(groups) > most and alike else groups
    told = []
    for label, members in groups.items():
        bounds = [point.differences[metric] for point in members]
        mean = math.fsum(value for value, _, _ in bounds) / len(bounds)
        low, high = min(low for _, low, _ in bounds), max(high for _, _, high in bounds)
        told.append(Difference(label, members[0].method or "float", mean, low, high, len(bounds)))
    order = {label: width_order(f"{members[0].vision} {members[0].text}") for label, members in groups.items()}
    return sorted(told, key=lambda d: (order[d.label][0], d.label))[:most]


def sizes(points: Sequence[Point], metric: str) -> list[Sized]:
    """Return size against accuracy of all methods, float included, with those that nothing beats."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        if metric in point.metrics and point.bytes > 0:
            groups.setdefault(point.label, []).append(point)
    rows = []
    for label, members in groups.items():
        megabytes = math.fsum(point.bytes for point in members) / len(members) / 1e6
        value = Spread.of([point.metrics[metric] for point in members]).mean
        rows.append((label, members[0].method or "float", megabytes, value))
    return [
        Sized(*row, best=not any((m <= row[2] and v > row[3]) or (m < row[2] and v >= row[3]) for _, _, m, v in rows))
        for row in sorted(rows, key=lambda row: (row[2], row[0]))
    ]


def layer_sqnr(points: Sequence[Point], most: int = 4) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return the SQNR of each layer, in order of the network, of the first points that have it, by label."""
    told: dict[str, list[tuple[str, float]]] = {}
    for point in points:
        if point.sqnr_db and point.label not in told and len(told) < most:
            told[point.label] = list(point.sqnr_db.items())
    return list(told.items())


def cosine_curves(points: Sequence[Point], kind: str) -> list[tuple[str, list[float]]]:
    """Return the densities over [-1, 1] of one kind of pairs, float first, by label."""
    told: dict[str, list[float]] = {}
    for point in sorted(points, key=lambda p: width_order(f"{p.vision} {p.text}")[0]):
        seen: Any = point.cosine.get(kind, {})
        if "float" in seen:
            told.setdefault("float", [float(x) for x in seen["float"]["density"]])
        if "quantized" in seen:
            told.setdefault(point.label, [float(x) for x in seen["quantized"]["density"]])
    return list(told.items())


def depth(finding: Finding) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return {tower: {operand: (place of the layer, relative error predicted for the embedding)}} of an analysis."""
    order: dict[str, dict[str, int]] = {}
    told: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in finding.rows:
        if row["scope"] != "operand":
            continue
        tower = str(row["tower"])
        places = order.setdefault(tower, {})
        place = places.setdefault(str(row["layer"]), len(places))
        told.setdefault(tower, {}).setdefault(str(row["operand"]), []).append((place, float(row["predicted"])))
    return told


def mistakes(points: Sequence[Point]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the pictures that quantization cost, by label, of those points that name some."""
    told: dict[str, Mapping[str, Any]] = {}
    for point in points:
        if point.mistakes.get("rows"):
            told.setdefault(point.label, point.mistakes)
    return list(told.items())
