"""The page: one HTML file that loads nothing and runs nothing."""

import base64
import html
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_clipq.analysis.counts import describe_counts
from lit_clipq.errors import DataError
from lit_clipq.report.draw import DARK, Figure
from lit_clipq.report.points import Finding, Point
from lit_clipq.report.tables import cosine_rows, heading, rows_of

log = logging.getLogger(__name__)

SIDE = 192
"""Longer side of an embedded picture, in pixels."""
_LIGHT = {
    "ink": "#1b1b1c", "muted": "#5b5b5d", "line": "#d8d8da", "paper": "#fefefe", "raised": "#f4f4f6", "mark": "#fff0dc",
}  # fmt: skip
_NIGHT = {
    "ink": "#ececee", "muted": "#a9a9ad", "line": "#3c3c41", "paper": "#17181b", "raised": "#212328", "mark": "#4a3413",
}  # fmt: skip
_STYLE = """
:root{color-scheme:light dark;%(light)s}
@media (prefers-color-scheme:dark){:root{%(dark)s}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1.2rem}
body{color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem;margin:.2rem 0}
h2{font-size:1.2rem;margin:2.2rem 0 .3rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}p{margin:.3rem 0;color:var(--muted)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{font-weight:600;background:var(--raised)}th:first-child,td:first-child,.text{text-align:left}
td.text{white-space:normal;min-width:11rem;vertical-align:top}td.wrong{background:var(--mark)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%%),1fr));gap:1rem 1.6rem}
.figures{align-items:start}
figure{margin:.8rem 0;min-width:0}figure.wide{grid-column:1/-1}
figure svg{display:block;width:100%%;height:auto;max-width:60rem}
figcaption{color:var(--muted);font-size:.85rem}figcaption b{color:var(--ink)}
img{display:block;max-width:12rem}code,pre{font:.82rem/1.45 ui-monospace,monospace}
pre{background:var(--raised);padding:.6rem .8rem;overflow-x:auto;margin:.3rem 0}li{color:var(--muted)}
details{margin:.5rem 0}summary{cursor:pointer}
""".strip()


def render(
    sections: Sequence[tuple[Sequence[Point], Sequence[Figure]]],
    findings: Sequence[tuple[Finding, Sequence[Figure]]],
    mistakes: Sequence[tuple[str, Mapping[str, Any]]],
    problems: Sequence[str],
) -> str:
    """Return the page.

    Args:
        sections: Points that may be compared, with their figures.
        findings: Analyses with theirs.
        mistakes: Pictures that quantization cost, by label.
        problems: What was left out.
    """
    points = [point for members, _ in sections for point in members]
    parts = ["<h1>Float and quantized</h1>", f"<p>{_counted(points, findings)}</p>"]
    if problems:
        parts += ["<h3>Left out</h3>", "<ul>", *(f"<li>{_e(problem)}</li>" for problem in problems), "</ul>"]
    for members, figures in sections:
        parts += _section(members, figures)
    for finding, figures in findings:
        title = f"Sensitivity · {finding.model} · {finding.method} {finding.widths}"
        parts += [f"<h2>{_e(title)}</h2>", *_figures(figures), *_sensitive(finding)]
    for label, told in mistakes:
        parts += _mistakes(label, told)
    parts += _origin(points, [finding for finding, _ in findings])
    colours = {f"c{light[1:]}": (light, dark) for light, dark in DARK.items()}
    colours |= {name: (_LIGHT[name], _NIGHT[name]) for name in _LIGHT}
    style = _STYLE % {
        "light": "".join(f"--{name}:{light};" for name, (light, _) in colours.items()),
        "dark": "".join(f"--{name}:{dark};" for name, (_, dark) in colours.items()),
    }
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            f"<title>Float and quantized</title><style>{style}</style></head><body>",
            *parts,
            "</body></html>",
            "",
        ]
    )


def _counted(points: Sequence[Point], findings: Sequence[Any]) -> str:
    quantized = sum(point.method is not None for point in points)
    told = [f"{quantized} quantized network{'s' * (quantized != 1)}"] if quantized else []
    told += [] if quantized or not points else ["nothing is quantized"]
    told += [f"{len(findings)} sensitivity analys{'i' if len(findings) == 1 else 'e'}s"] if findings else []
    return _e(", ".join(told).capitalize()) + "."


def _section(points: Sequence[Point], figures: Sequence[Figure]) -> list[str]:
    heads, rows = rows_of(points)
    note = "In brackets: quantized - float in points, with a 95 % interval of a paired bootstrap over pictures."
    quantized = any(point.method is not None for point in points)
    table = _table(heads, rows)
    if len(rows) > 16:
        table = [f"<details><summary>All {len(rows)} rows</summary>", *table, "</details>"]
    return [
        f"<h2>{_e(heading(points[0]))}</h2>",
        f"<p>N: {_e(describe_counts(points[0].samples))}.</p>",
        *_figures(figures),
        *table,
        *([f"<p>{note}</p>"] if quantized else []),
        *_cosines(points),
    ]


def _cosines(points: Sequence[Point]) -> list[str]:
    """Return what moved between the cosines of float and quantized networks."""
    heads, rows = cosine_rows(points)
    return ["<h3>Cosine of picture and text, quantized against float</h3>", *_table(heads, rows)] if rows else []


def _figures(figures: Sequence[Figure]) -> list[str]:
    if not figures:
        return []
    shown: list[str] = []
    metric = ""
    for number, figure in enumerate(figures):
        if figure.metric != metric:
            metric = figure.metric
            shown.append(
                f'{"</div>" if shown else ""}<h3>{_e(metric or "Behind the metrics")}</h3><div class="figures">'
            )
        css = ' class="wide"' if figure.wide else ""
        svg = _own_ids(figure.svg, f"{figure.name}-{number}-")
        shown.append(
            f"<figure{css}>{svg}<figcaption><b>{_e(figure.title)}.</b> {_e(figure.caption)}</figcaption></figure>"
        )
    return [*([] if figures[0].metric else ['<div class="figures">']), *shown, "</div>"]


def _own_ids(svg: str, prefix: str) -> str:
    """Make ids of one figure its own: matplotlib numbers them anew in each."""
    return (
        svg.replace('id="', f'id="{prefix}')
        .replace("url(#", f"url(#{prefix}")
        .replace('xlink:href="#', f'href="#{prefix}')
    )


def _sensitive(finding: Finding, most: int = 12) -> list[str]:
    operands = [row for row in finding.rows if row["scope"] == "operand"]
    worst = sorted(operands, key=lambda row: -float(row["predicted"]))[:most]
    rows = []
    for row in worst:
        true = row.get("embedding")
        rows.append(
            [
                str(row["layer"]),
                str(row["operand"]),
                f"{100 * float(row['predicted']) ** 0.5:.3g}",
                "" if true is None else f"{100 * float(true) ** 0.5:.3g}",
            ]
        )
    table = _table(["most sensitive", "operand", "predicted error (%)", "measured error (%)"], rows)
    return [*table, *([f"<p>To paste:</p><pre>{_e(finding.patterns)}</pre>"] if finding.patterns else [])]


def _mistakes(label: str, told: Mapping[str, Any]) -> list[str]:
    counts = (
        f"{told.get('lost', 0)} pictures right in float and wrong quantized, {told.get('won', 0)} the other way round"
    )
    body = []
    for row in told["rows"]:
        body.append(
            f'<tr><td>{_picture(Path(str(row["file"])))}</td><td class="text">{_e(row["own"])}</td>'
            f'<td class="text">{_e(row["float"])}</td><td class="text wrong">{_e(row["quantized"])}</td></tr>'
        )
    return [
        f"<h2>{_e(f'Right in float, wrong quantized · {label}')}</h2>",
        f"<p>{_e(counts)}, of {_e(told.get('pictures', ''))}; those that lose the most.</p>",
        '<div class="scroll"><table><thead><tr><th>picture</th><th class="text">a text of its own</th>'
        '<th class="text">float</th><th class="text">quantized</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>",
    ]


def _picture(path: Path) -> str:
    """Return a picture with its content inside; its name where it cannot be read."""
    from lit_clipq.pictures import load_rgb

    try:
        small = load_rgb(path)
    except DataError as error:
        log.warning("the report leaves a picture out: %s", error)
        return f"<em>{_e(path.name)} cannot be read</em>"
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{_e(path.name)}" src="data:image/jpeg;base64,{content}">'


def _origin(points: Sequence[Point], findings: Sequence[Finding]) -> list[str]:
    """Say what was run, and with which versions."""
    runs: list[Point | Finding] = [*points, *findings]
    commands = list(dict.fromkeys(run.command for run in runs if run.command))
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.versions.items():
            versions.setdefault(name, {})[version] = None
    parts = ["<h2>Versions and commands</h2>"]
    if versions:
        parts += _table(["package", "version"], [[name, ", ".join(found)] for name, found in versions.items()])
    if commands:
        parts += [f"<pre>{_e(chr(10).join(commands))}</pre>"]
    files = dict.fromkeys(run.source.partition(", line ")[0] for run in runs)
    return [*parts, f"<p>Read from {_e(', '.join(files))}.</p>"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = "".join(f"<th>{_e(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return [f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>']


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)
