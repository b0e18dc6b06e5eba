"""Tables of a report: CSV with every number as it was read, and Markdown."""

import csv
import io
from collections.abc import Sequence

from lit_clipq.analysis.counts import describe_counts
from lit_clipq.report.points import Point
from lit_clipq.report.series import by_setting, float_value

COLUMNS = (
    "task", "model", "pretrained", "method", "vision_weight_bits", "vision_activation_bits", "text_weight_bits",
    "text_activation_bits", "patterns", "seed", "metric", "value", "float_value", "difference", "low", "high",
    "float_bytes", "bytes", "float_macs_share", "calibration_samples", "samples", "source",
)  # fmt: skip
"""Of the CSV; a row is one metric of one point, fractions as they were read."""


def csv_table(points: Sequence[Point]) -> str:
    """Return every metric of every point as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in points:
        bits = [
            point.widths.get(f"{tower}_{operand}", 32)
            for tower in ("vision", "text")
            for operand in ("weight", "activation")
        ]
        for metric, value in point.metrics.items():
            difference = point.differences.get(metric, ("", "", ""))
            row = [
                point.task, point.model, point.pretrained or "", point.method or "float", *bits,
                point.patterns.strip(" +"), point.seed, metric, repr(value), _repr(point.float_metrics.get(metric)),
                *map(_repr, difference), point.float_bytes, point.bytes, repr(point.float_macs_share),
                point.calibration_samples, describe_counts(point.samples), point.source,
            ]  # fmt: skip
            writer.writerow([_inert(str(cell)) for cell in row])
    return out.getvalue()


def _repr(value: object) -> str:
    return "" if value in (None, "") else repr(value)


def _inert(cell: str) -> str:
    """Keep spreadsheets from taking text for a formula; numbers stay as they are."""
    try:
        float(cell)
    except ValueError:
        return f"'{cell}" if cell[:1] in "=+-@\t\r" and cell else cell
    return cell


def rows_of(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of one setting's table: a row a point, in percent; without differences if all is float."""
    metrics = list(dict.fromkeys(name for point in points for name in point.metrics))
    quantized = [point for point in points if point.method is not None]
    if not quantized:
        heads = ["metric", "float"]
        values = {metric: float_value(points, metric) for metric in metrics}
        rows = [[f"{metric} (%)", f"{100 * value:.2f}"] for metric, value in values.items() if value is not None]
        size = next((point.bytes for point in points if point.bytes), 0)
        return heads, [*rows, *([["model size (MB)", f"{size / 1e6:.2f}"]] if size else [])]
    seeds = len({point.seed for point in quantized}) > 1
    heads = [
        "method",
        "vision",
        "text",
        *(["seed"] if seeds else []),
        *(f"{metric} (%)" for metric in metrics),
        "size (MB)",
    ]
    rows, shown = [], set()
    for point in points:
        cells = [point.method or "float", point.vision, point.text + point.patterns]
        cells += [str(point.seed) if point.method else ""] if seeds else []
        cells += [_cell(point, metric) for metric in metrics]
        cells.append(f"{point.bytes / 1e6:.2f}" if point.bytes else "")
        if point.method is not None or tuple(cells) not in shown:
            rows.append(cells)
        shown.add(tuple(cells))
    return heads, sorted(rows, key=lambda row: row[0] != "float")


def cosine_rows(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of what moved between the cosines of float and quantized networks."""
    heads = ["method", "pairs", "number", "mean float", "mean quantized", "shift", "Wasserstein", "rank correlation"]
    rows = []
    for point in points:
        for kind in ("matched", "unmatched"):
            told = point.cosine.get(kind, {})
            if "quantized" in told:
                numbers = [told["float"]["mean"], told["quantized"]["mean"], told["mean_shift"], told["wasserstein"]]
                shown = [f"{number:+.4f}" if i == 2 else f"{number:.4f}" for i, number in enumerate(numbers)]
                rank = told["rank_correlation"]
                rows.append([point.label, kind, f"{told['pairs']:,}", *shown, "" if rank is None else f"{rank:.4f}"])
    return heads, rows


def _cell(point: Point, metric: str) -> str:
    if metric not in point.metrics:
        return ""
    value = f"{100 * point.metrics[metric]:.2f}"
    if point.method is None or metric not in point.differences:
        return value
    difference, low, high = point.differences[metric]
    return f"{value} ({100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}])"


def markdown(points: Sequence[Point], problems: Sequence[str], figures: Sequence[tuple[str, str]]) -> str:
    """Return tables and figures as Markdown.

    Args:
        points: All that were read.
        problems: What was left out.
        figures: Title and file of each.
    """
    lines = ["# Report", ""]
    for members in by_setting(points).values():
        first = members[0]
        heads, rows = rows_of(members)
        lines += [f"## {_plain(heading(first))}", "", f"N: {_plain(describe_counts(first.samples))}", ""]
        lines += ["| " + " | ".join(map(_plain, heads)) + " |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
        lines.append("")
        heads, rows = cosine_rows(members)
        if rows:
            lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            lines += [*("| " + " | ".join(map(_plain, row)) + " |" for row in rows), ""]
    lines += [f"![{_plain(title)}]({file})" for title, file in figures]
    if problems:
        lines += ["", "## Left out", "", *(f"- {_plain(problem)}" for problem in problems)]
    return "\n".join(lines) + "\n"


def heading(point: Point) -> str:
    """Name task, model and weights."""
    return " · ".join(part for part in (point.task, point.model, point.pretrained) if part)


def _plain(text: str) -> str:
    """Return text that Markdown and the HTML in it leave as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
    return "".join(f"\\{c}" if c in "[]`*_" else c for c in text)
