"""Rows of an analysis, and the table that shows the worst of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table

Scope = Literal["operand", "layer", "block", "tower"]


@dataclass(frozen=True)
class Row:
    """What quantizing one thing costs. Errors are squared and relative to the outputs that matter, embeddings."""

    scope: Scope
    """What is quantized: one operand of a layer, a layer, a block, a tower."""
    layer: str
    """Name of the layer, the block or the tower."""
    tower: str
    operand: str
    """`weight`, `input`, `a`, `b`, or `all`."""
    bits: int
    """Width of the operand, of several the narrowest."""
    predicted: float
    """Squared relative error of the embedding with this alone quantized, from the layer's own error and Gauss-Newton
    weights; of blocks and towers the sum over their layers."""
    share: float
    """Share of the tower's prediction: what leaving this float alone would save."""
    sqnr_db: float | None = None
    """Signal-to-noise ratio of the layer's own product, `None` where there is no error or several layers."""
    embedding: float | None = None
    """The squared relative error that was measured by running the rest of the network; `None` where not asked for."""
    left_float: float | None = None
    """That of the tower quantized whole but for this."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The task's metrics with this alone quantized, where asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def decibels(squared: float | None) -> float | None:
    """Return the signal-to-noise ratio of a squared relative error."""
    return -10 * math.log10(squared) if squared is not None and squared > 0 else None


def analysis_table(rows: Sequence[Row], ranges: Sequence[Mapping[str, Any]], most: int = 16) -> RenderableType:
    """Render the rows of the highest prediction, and the layers of the farthest outliers.

    Args:
        rows: Of an analysis.
        ranges: Of an analysis.
        most: So many rows of either at most.
    """
    table = Table(title="Quantized alone, the most sensitive first", title_justify="left")
    for name in ("layer", "operand"):
        table.add_column(name)
    heads = ("bits", "product (dB)", "predicted (%)", "share (%)", "measured (%)", "all but this (%)")
    for name in heads:
        table.add_column(name, justify="right")
    for scope in ("tower", "block", "layer", "operand"):
        chosen = sorted((row for row in rows if row.scope == scope), key=lambda row: -row.predicted)
        for row in chosen[: most if scope in ("layer", "operand") else 4]:
            cells = [str(row.bits), _number(row.sqnr_db), _percent(row.predicted), f"{100 * row.share:.1f}"]
            cells += [_percent(row.embedding), _percent(row.left_float)]
            table.add_row(row.layer, row.operand, *cells)
        table.add_section()
    evaluated = [row for row in rows if row.metrics]
    return Group(table, *([_metrics_table(evaluated)] if evaluated else []), _ranges_table(ranges, most))


def _metrics_table(rows: Sequence[Row]) -> RenderableType:
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    table = Table(title="The task with a layer quantized alone (%)", title_justify="left")
    table.add_column("layer")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for row in sorted(rows, key=lambda row: -row.predicted):
        table.add_row(row.layer, *(f"{100 * row.metrics[metric]:.2f}" for metric in metrics))
    return table


def _ranges_table(ranges: Sequence[Mapping[str, Any]], most: int) -> RenderableType:
    table = Table(title="Inputs, the farthest outliers first", title_justify="left")
    for name in ("layer", "channels", "tokens"):
        table.add_column(name)
    for name in ("range", "channel / median", "token / median", "on the first token (%)"):
        table.add_column(name, justify="right")
    for row in sorted(ranges, key=lambda row: -row["channel_ratio"])[:most]:
        first = row["first_largest"]
        table.add_row(
            row["layer"],
            ", ".join(str(channel["channel"]) for channel in row["channels"][:3]),
            ", ".join(str(token["token"]) for token in row["tokens"][:3]),
            f"{row['low']:.3g} to {row['high']:.3g}",
            f"{row['channel_ratio']:.1f}",
            "" if row["token_ratio"] is None else f"{row['token_ratio']:.1f}",
            "" if first is None else f"{100 * first:.0f}",
        )
    return table


def _percent(squared: float | None) -> str:
    return "" if squared is None else f"{100 * squared**0.5:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
