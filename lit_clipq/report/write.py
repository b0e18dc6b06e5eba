"""From results to files: the page, the figures, the tables."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_clipq.errors import ConfigError
from lit_clipq.paths import write_whole
from lit_clipq.report import draw, series
from lit_clipq.report.page import render
from lit_clipq.report.points import Point, read_points
from lit_clipq.report.tables import csv_table, markdown


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    files: tuple[Path, ...]
    """All files, the page first."""
    points: int
    """How many networks were read, float ones included."""
    problems: tuple[str, ...]
    """What was left out, in one sentence each."""


def write_report(paths: Iterable[str | Path], folder: str | Path = "report") -> Report:
    """Write `report.html`, `report.md`, `results.csv` and `figures/*.svg`, `*.png`; the same bytes from the same files.

    Everything is made before the first file is written.

    Args:
        paths: results.json, results.jsonl and analysis.json files, or folders that hold some.
        folder: Where the files go; it is made if it is not there.

    Raises:
        DataError: If there is nothing to report, or a file is damaged.
        ConfigError: If matplotlib is not installed, or the folder is a file.
        OSError: If the folder cannot be written.
    """
    draw.pyplot()
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"expected a folder for the report, but {target} is a file; give another --out")
    read = read_points(paths)
    sections = [
        (members, figures_of(members, f"{i:02d}"))
        for i, members in enumerate(series.by_setting(read.points).values(), 1)
    ]
    findings = [
        (finding, [draw.depth_figure(f"sensitivity-{i:02d}", finding)] if series.depth(finding) else [])
        for i, finding in enumerate(read.findings, 1)
    ]
    mistakes = series.mistakes(read.points)
    page = render(sections, findings, mistakes, read.problems)
    figures = [figure for _, drawn in [*sections, *findings] for figure in drawn]
    named = [(figure.title, f"figures/{figure.name}.svg") for figure in figures]
    files = {"report.html": page, "report.md": markdown(read.points, read.problems, named)}
    files |= {"results.csv": csv_table(read.points)} if read.points else {}
    files |= {f"figures/{figure.name}.svg": draw.standalone(figure) for figure in figures}
    pictures: dict[str, str | bytes] = {f"figures/{figure.name}.png": figure.png for figure in figures}
    for name, content in {**pictures, **files}.items():
        write_whole(target / name, content)
    written = [*files, *pictures]
    return Report(
        target / "report.html", tuple(target / name for name in written), len(read.points), tuple(read.problems)
    )


def figures_of(points: Sequence[Point], prefix: str) -> list[draw.Figure]:
    """Draw what points of one setting have to show.

    Args:
        points: Which may be compared.
        prefix: Of the figures' names.
    """
    if all(point.method is None for point in points):
        return _cosines(points, prefix)
    drawn = []
    methods = series.methods_of(points)
    for metric in series.main_metrics(points):
        name = f"{prefix}-{re.sub(r'[^a-z0-9]+', '-', metric.lower()).strip('-') or 'metric'}"
        baseline = series.float_value(points, metric)
        found = series.curves(points, metric)
        if found:
            drawn.append(draw.accuracy_figure(f"{name}-bits", metric, found, baseline, methods))
        for i, heat in enumerate(series.heat_maps(points, metric), 1):
            drawn.append(draw.heat_figure(f"{name}-heat-{i}", metric, heat, baseline))
        rows = series.differences(points, metric)
        if len(rows) > 1:
            drawn.append(draw.difference_figure(f"{name}-methods", metric, rows, methods))
        sized = series.sizes(points, metric)
        if len(sized) > 2:
            drawn.append(draw.size_figure(f"{name}-size", metric, sized, methods))
    layers = series.layer_sqnr(points)
    if layers:
        drawn.append(draw.sqnr_figure(f"{prefix}-layers", layers))
    return [*drawn, *_cosines(points, prefix)]


def _cosines(points: Sequence[Point], prefix: str) -> list[draw.Figure]:
    matched, unmatched = (series.cosine_curves(points, kind) for kind in ("matched", "unmatched"))
    return [draw.cosine_figure(f"{prefix}-cosine", matched, unmatched)] if matched and unmatched else []
