"""Figures: matplotlib, colours that colour-blind readers tell apart, SVG that follows the reader's dark mode, PNG."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_clipq.errors import ConfigError
from lit_clipq.report.points import Finding
from lit_clipq.report.series import BOTH, Curve, Difference, HeatMap, Sized, depth, width_order

INK, MUTED, GRID, PAPER = "#1b1b1c", "#5b5b5d", "#d8d8da", "#fefefe"
COLOURS = ("#0072b3", "#d55e01", "#009e74", "#cc79a8", "#b07d00", "#4b4bb5", "#7a7a7c", "#56a0d4")
"""Of series; after Okabe and Ito, darker where a thin line on white needs it."""
DARK = {
    INK: "#ececee", MUTED: "#a9a9ad", GRID: "#3c3c41", PAPER: "#17181b", COLOURS[0]: "#5ab4ec", COLOURS[1]: "#f58b45",
    COLOURS[2]: "#3fcfa3", COLOURS[3]: "#e3a3c8", COLOURS[4]: "#e3b341", COLOURS[5]: "#a3a3f5", COLOURS[6]: "#b4b4b8",
    COLOURS[7]: "#8cc8f0",
}  # fmt: skip
"""What takes the place of each colour in dark mode."""
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
_NARROW, _WIDE, _HEIGHT = 4.7, 9.6, 3.1
_PNG_DPI = 160
_OPERANDS = {"all": "all operands", "weight": "weight", "input": "input", "a": "left operand", "b": "right operand"}


@dataclass(frozen=True)
class Figure:
    """One figure in both formats."""

    name: str
    """Of its files."""
    title: str
    caption: str
    """What is to be seen, in one or two sentences."""
    svg: str
    """Colours are CSS variables with the light ones as default."""
    png: bytes
    wide: bool = False
    metric: str = ""
    """What it shows, where that is one metric."""


def pyplot() -> Any:
    """Return `matplotlib.figure.Figure`.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ConfigError(
            f"a report draws with matplotlib, which cannot be imported ({error}); pip install 'lit-clipq[report]'"
        ) from error
    return Canvas


def draw(
    name: str, title: str, caption: str, paint: Callable[[Any], None], size: tuple[float, float], metric: str = ""
) -> Figure:
    """Draw one figure.

    Args:
        name: Of its files.
        title: Shown above it.
        caption: Shown below it.
        paint: Draws into a matplotlib figure.
        size: Width and height in inches.
        metric: What it shows, where that is one metric.
    """
    canvas = pyplot()
    with _style():
        figure = canvas(figsize=size, layout="constrained")
        paint(figure)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
    return Figure(name, title, caption, _followed(svg.getvalue(), title), png.getvalue(), size[0] > 6, metric)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    options: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "lit_clipq", "text.parse_math": False, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "axes.labelsize": 9.5, "legend.fontsize": 9.0,
        "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.axisbelow": True,
        "lines.linewidth": 1.6, "lines.markersize": 4.5,
    }  # fmt: skip
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(options)
        yield


def _followed(svg: str, title: str) -> str:
    """Let an SVG follow dark mode and the width of its column, and say what it shows to who does not see it."""
    svg = svg[svg.index("<svg") :]
    for colour in (INK, MUTED, GRID, PAPER, *COLOURS):
        svg = svg.replace(colour, f"var(--c{colour[1:]}, {colour})")
    svg = svg.replace("'DejaVu Sans', sans-serif", "system-ui, 'DejaVu Sans', sans-serif")
    head = re.match(r"<svg[^>]*>", svg)
    assert head is not None  # noqa: S101 - matplotlib wrote it
    opened = re.sub(r'(width|height)="[\d.]+pt"\s*', "", head.group())
    opened = opened.replace("<svg", f'<svg role="img" aria-label="{_escaped(title)}"', 1)
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[head.end() :], flags=re.DOTALL)
    return opened + body


def standalone(figure: Figure) -> str:
    """Return the SVG as a file of its own, which follows the reader's dark mode."""
    dark = "".join(f"--c{light[1:]}:{colour};" for light, colour in DARK.items())
    head = figure.svg.index(">") + 1
    style = f"<style>@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{figure.svg[:head]}{style}{figure.svg[head:]}'


def _escaped(text: str) -> str:
    import html

    return html.escape(text, quote=True)


def accuracy_figure(
    name: str, metric: str, found: Sequence[Curve], baseline: float | None, methods: Sequence[str]
) -> Figure:
    """Accuracy against bits, mean over seeds with bars from the lowest to the highest."""
    widths = sorted({width for curve in found for width in curve.widths}, key=width_order)
    seeds = max(spread.seeds for curve in found for spread in curve.values)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        if baseline is not None:
            axes.axhline(100 * baseline, color=MUTED, linestyle="--", linewidth=1, label="float")
        varied = list(dict.fromkeys([BOTH, *(curve.varied for curve in found)]))
        for curve in found:
            i, j = methods.index(curve.method), varied.index(curve.varied)
            x = [widths.index(width) for width in curve.widths]
            y = [100 * spread.mean for spread in curve.values]
            below = [100 * (s.mean - s.low) for s in curve.values]
            above = [100 * (s.high - s.mean) for s in curve.values]
            axes.errorbar(
                x, y, yerr=[below, above], label=f"{curve.method}, {curve.varied}", color=COLOURS[i % len(COLOURS)],
                capsize=2.5, marker=MARKERS[j % len(MARKERS)], linestyle=DASHES[j % len(DASHES)],
                markerfacecolor=COLOURS[i % len(COLOURS)] if j == 0 else "none",
            )  # fmt: skip
        axes.set_xticks(range(len(widths)), widths)
        axes.set_xlabel("width of weights and activations (bits)")
        axes.set_ylabel(f"{metric} (%)")
        axes.set_ylim(bottom=0)
        _legend(figure, axes)

    spread = f"; points are means over up to {seeds} calibration seeds, bars reach from the lowest to the highest"
    caption = f"{metric} against the width of a tower{spread if seeds > 1 else ''}."
    height = _HEIGHT + 0.2 * (len(found) + 1) / 2
    return draw(name, f"{metric} against bits", caption, paint, (_NARROW, height), metric)


def heat_figure(name: str, metric: str, heat: HeatMap, baseline: float | None) -> Figure:
    """Accuracy at each pair of widths, darker where it is lower."""
    import math

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        values = [[math.nan if cell is None else 100 * cell.mean for cell in row] for row in heat.values]
        top = 100 * baseline if baseline is not None else max(v for row in values for v in row if v == v)
        mesh = axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=max(top, 1e-9), edgecolors="none")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value == value:
                    colour = "#000000" if value > 0.5 * top else "#ffffff"
                    axes.text(j + 0.5, i + 0.5, f"{value:.1f}", ha="center", va="center", color=colour)
        axes.set_xticks([j + 0.5 for j in range(len(heat.text))], heat.text)
        axes.set_yticks([i + 0.5 for i in range(len(heat.vision))], heat.vision)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("width of the text tower (bits)")
        axes.set_ylabel("width of the image tower (bits)")
        figure.colorbar(mesh, ax=axes, label=f"{metric} (%)")

    seeds = max(cell.seeds for row in heat.values for cell in row if cell is not None)
    caption = f"{heat.method}: {metric} in % at each pair of widths" + (
        f", means over up to {seeds} calibration seeds." if seeds > 1 else "."
    )
    return draw(
        name,
        f"{metric}, vision x text, {heat.method}",
        caption,
        paint,
        (_NARROW, 0.45 * len(heat.vision) + 1.3),
        metric,
    )


def difference_figure(name: str, metric: str, rows: Sequence[Difference], methods: Sequence[str]) -> Figure:
    """Differences to float with their intervals, a line for each method and widths."""
    seeds = max(row.seeds for row in rows)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, row in enumerate(rows):
            i = methods.index(row.method)
            bar = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
            axes.errorbar(
                100 * row.value, place, xerr=bar, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                capsize=2.5,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [_short(row.label, 34) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"{metric}, quantized - float (points)")
        axes.grid(visible=False, axis="y")

    told = f"; the envelope of the intervals of up to {seeds} calibration seeds" if seeds > 1 else ""
    caption = f"Difference of {metric} to float with 95 % intervals of a paired bootstrap over pictures{told}."
    return draw(name, f"{metric}, methods compared", caption, paint, (_NARROW, 0.8 + 0.24 * len(rows)), metric)


def size_figure(name: str, metric: str, rows: Sequence[Sized], methods: Sequence[str]) -> Figure:
    """Size against accuracy, with the line of those that no other beats."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        front = [row for row in rows if row.best]
        axes.plot(
            [r.megabytes for r in front], [100 * r.value for r in front], color=MUTED, linewidth=1, zorder=1,
            drawstyle="steps-post",
        )  # fmt: skip
        for i, method in enumerate([*methods, "float"]):
            own = [row for row in rows if row.method == method]
            axes.scatter(
                [r.megabytes for r in own], [100 * r.value for r in own], s=26, zorder=2, label=method,
                color=INK if method == "float" else COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
            )  # fmt: skip
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, [row.megabytes for row in rows])
        axes.set_xlabel("stored size (MB, logarithmic)")
        axes.set_ylabel(f"{metric} (%)")
        axes.set_ylim(bottom=0)
        _legend(figure, axes)

    caption = (
        "Size of codes, grids and whatever stayed float; the grey line joins the networks that no other beats in both."
    )
    return draw(name, f"{metric} against size", caption, paint, (_NARROW, _HEIGHT + 0.2), metric)


def _log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Mark about five round numbers on a logarithmic axis, also within one decade."""
    import math

    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    steps = (1,) if high / low > 1000 else (1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    marks = [step * 10.0**power for power in range(first, last) for step in steps]
    axis.set_major_locator(FixedLocator([mark for mark in marks if low / 1.5 <= mark <= high * 1.5]))
    axis.set_major_formatter(lambda x, _: f"{x:.3g}")
    axis.set_minor_locator(NullLocator())


def sqnr_figure(name: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> Figure:
    """Signal-to-noise ratio of each layer's own output, over the depth of the network."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for i, (label, layers) in enumerate(rows):
            axes.plot(
                range(len(layers)), [value for _, value in layers], label=_short(label, 40),
                color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=3, linewidth=1,
            )  # fmt: skip
        names = [layer for layer, _ in rows[0][1]]
        _block_ticks(axes, names)
        towers = [("image tower", [i for i, n in enumerate(names) if ".visual." in n or n.startswith("vision.")])]
        towers += [("text tower", [i for i, n in enumerate(names) if n.startswith("clip.") and ".visual." not in n])]
        for tower, places in towers:
            if places:
                axes.text(places[0], 1.0, tower, transform=axes.get_xaxis_transform(), va="bottom", color=MUTED)
        axes.set_xlabel("block, in order of the network")
        axes.set_ylabel("SQNR of its output (dB)")
        _legend(figure, axes)

    caption = "Signal-to-quantization-noise ratio of every layer's output on calibration data; low is bad."
    return draw(name, "Layers over depth", caption, paint, (_WIDE, _HEIGHT))


def depth_figure(name: str, finding: Finding) -> Figure:
    """Relative error of the embedding when one operand of one layer is quantized alone, over depth."""
    towers = depth(finding)

    def paint(figure: Any) -> None:
        for axes, (tower, operands) in zip(
            figure.subplots(1, len(towers), sharey=True, squeeze=False)[0], towers.items(), strict=True
        ):
            for i, (operand, label) in enumerate(_OPERANDS.items()):
                if operand in operands and operand != "all":
                    x, y = zip(*operands[operand], strict=True)
                    axes.plot(
                        x, [100 * v**0.5 for v in y], label=label, color=COLOURS[i % len(COLOURS)], linewidth=0,
                        marker=MARKERS[i % len(MARKERS)], markersize=4,
                    )  # fmt: skip
            own = [r for r in finding.rows if r["tower"] == tower and r["scope"] == "operand"]
            names = list(dict.fromkeys(str(r["layer"]) for r in own))
            _block_ticks(axes, names)
            axes.set_yscale("log")
            axes.set_title(f"{tower} tower", fontsize=9)
            axes.set_xlabel("block")
        shown = [100 * v**0.5 for operands in towers.values() for rows in operands.values() for _, v in rows if v > 0]
        _log_ticks(figure.axes[0].yaxis, shown)
        figure.axes[0].set_ylabel("error of the embedding (%)")
        handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)

    caption = (
        f"{finding.method} {finding.widths}: relative error of the embedding, predicted by Gauss-Newton weights, with "
        "a single operand of a single layer quantized."
    )
    return draw(name, f"Sensitivity over depth, {finding.model}", caption, paint, (_WIDE, _HEIGHT + 0.3))


def _block_ticks(axes: Any, names: Sequence[str]) -> None:
    """Mark where blocks begin: members of lists of modules, by their number."""
    starts: dict[str, int] = {}
    for place, name in enumerate(names):
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        starts.setdefault(name if number is None else ".".join(parts[: number + 1]), place)
    shown = {place: block.rpartition(".")[2] for block, place in starts.items() if block.rpartition(".")[2].isdigit()}
    axes.set_xticks(list(shown), list(shown.values()), fontsize=7)


def cosine_figure(
    name: str, matched: Sequence[tuple[str, Sequence[float]]], unmatched: Sequence[tuple[str, Sequence[float]]]
) -> Figure:
    """Densities of image-text cosines, matched and unmatched, float and quantized."""
    both = [density for rows in (matched, unmatched) for _, density in rows]
    bins = len(both[0])
    seen = [i for density in both for i, value in enumerate(density) if value > 0]
    low, high = (-1 + 2 * place / bins for place in (max(min(seen) - 2, 0), min(max(seen) + 3, bins)))

    def paint(figure: Any) -> None:
        axes = figure.subplots(2, 1, sharex=True)
        for ax, rows, kind in zip(axes, (matched, unmatched), ("matched", "unmatched"), strict=True):
            for i, (label, density) in enumerate(rows):
                merged, step = _coarser(density, 4)
                x = [-1 + step * (k + 0.5) for k in range(len(merged))]
                colour = INK if label == "float" else COLOURS[(i - 1) % len(COLOURS)]
                ax.plot(
                    x, merged, color=colour, label=_short(label, 40), linewidth=2 if label == "float" else 1.3,
                    linestyle="-" if label == "float" else DASHES[(i - 1) % len(DASHES)],
                )  # fmt: skip
            ax.set_ylabel(f"{kind}\ndensity")
            ax.set_xlim(low, high)
            ax.set_ylim(bottom=0)
        axes[1].set_xlabel("cosine of picture and text")
        _legend(figure, axes[0])

    caption = "Densities of the cosine similarity of pictures with texts of their own (above) and with others (below)."
    return draw(name, "Cosine similarity", caption, paint, (_NARROW, 3.9))


def _coarser(density: Sequence[float], times: int) -> tuple[list[float], float]:
    """Average neighbouring bins; returns densities and the width of a bin."""
    whole = len(density) // times * times
    return [sum(density[i : i + times]) / times for i in range(0, whole, times)], 2 * times / len(density)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        widest = max(map(len, labels))
        figure.legend(handles, labels, loc="outside lower center", ncols=1 if widest > 32 else 2 if widest > 14 else 4)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def palette() -> Mapping[str, str]:
    """Return light colour to dark colour."""
    return DARK
