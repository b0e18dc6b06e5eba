"""A page of pictures with their references and the captions of the float and the quantized run side by side."""

import base64
import html
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_clipq.errors import DataError
from lit_clipq.paths import write_whole
from lit_clipq.pictures import load_rgb

logger = logging.getLogger(__name__)

SIDE = 224
"""Longer side of an embedded picture, in pixels; smaller pictures keep their size."""
LIMIT = 200
"""Pictures on a page, about 10 kB each."""
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.3rem; } p { color: #555; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .6rem; border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #fff; }
img { display: block; max-width: 14rem; min-width: 7rem; }
ul { margin: 0; padding-left: 1.1rem; color: #555; } td.score { text-align: right; white-space: nowrap; }
td.changed { background: #fff4e0; } small { color: #777; }
""".strip()


@dataclass(frozen=True)
class CaptionRow:
    """One picture on the page. CIDEr as a fraction."""

    image_id: int
    path: Path
    references: tuple[str, ...]
    float_caption: str
    quantized_caption: str | None = None
    """None in a run that quantizes nothing."""
    float_cider: float | None = None
    quantized_cider: float | None = None


def write_caption_page(
    path: Path, rows: Sequence[CaptionRow], title: str, notes: Sequence[str] = (), side: int = SIDE, limit: int = LIMIT
) -> None:
    """Write the page, whole or not at all. It needs no other file: pictures are inside, as small JPEGs.

    For one process to call: the first of several, with the captions of all.

    Args:
        path: HTML file.
        rows: the pictures, in the order of the page.
        title: heading, as plain text.
        notes: paragraphs below it, as plain text, such as the scores of the whole set.
        side: longer side of a picture in pixels.
        limit: how many rows are shown; the page says how many there are.

    Raises:
        OSError: The folder cannot be made or written.
    """
    write_whole(path, caption_page(rows, title, notes, side, limit))


def caption_page(
    rows: Sequence[CaptionRow], title: str, notes: Sequence[str] = (), side: int = SIDE, limit: int = LIMIT
) -> str:
    """Return the page as HTML; arguments as for `write_caption_page`."""
    quantized = any(row.quantized_caption is not None for row in rows)
    shown = rows[:limit]
    heads = ["picture", "references", "float", "CIDEr (%)", *(("quantized", "CIDEr (%)") if quantized else ())]
    paragraphs = [*notes, f"{len(shown):,} of {len(rows):,} pictures"] if len(shown) < len(rows) else notes
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *(f"<p>{html.escape(text)}</p>" for text in paragraphs),
            "<table><thead><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>",
            *(_table_row(row, side, quantized) for row in shown),
            "</tbody></table></body></html>",
            "",
        ]
    )


def _table_row(row: CaptionRow, side: int, quantized: bool) -> str:
    references = "".join(f"<li>{html.escape(text)}</li>" for text in row.references)
    cells = [
        f"<td>{_picture(row.path, side)}<small>{row.image_id}</small></td>",
        f"<td><ul>{references}</ul></td>",
        f'<td class="float">{html.escape(row.float_caption)}</td>',
        _score(row.float_cider),
    ]
    if quantized:
        changed = " changed" if row.quantized_caption != row.float_caption else ""
        caption = html.escape(row.quantized_caption or "")
        cells += [f'<td class="quantized{changed}">{caption}</td>', _score(row.quantized_cider)]
    return f"<tr>{''.join(cells)}</tr>"


def _score(value: float | None) -> str:
    return f'<td class="score">{"" if value is None else f"{100 * value:.1f}"}</td>'


def _picture(path: Path, side: int) -> str:
    """Return the picture as an element with its content inside; its name where it cannot be read."""
    name = html.escape(path.name)
    try:
        small = load_rgb(path)
    except DataError as error:
        logger.warning("the page of captions leaves a picture out: %s", error)
        return f"<em>{name} cannot be read</em>"
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{name}" loading="lazy" src="data:image/jpeg;base64,{content}">'
