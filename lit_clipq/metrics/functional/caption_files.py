"""Captions in the results format of COCO: `[{"image_id": 391895, "caption": "a man on a motorcycle"}, ...]`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_clipq.errors import DataError
from lit_clipq.paths import write_whole


def write_captions(path: Path, captions: Mapping[int, str]) -> None:
    """Write captions by picture id, ascending; the file is replaced whole or not at all.

    For one process to call: the first of several, with the captions of all.

    Raises:
        OSError: The folder cannot be made or written.
    """
    rows = [{"image_id": image_id, "caption": captions[image_id]} for image_id in sorted(captions)]
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_whole(path, f"[\n{lines}\n]\n" if rows else "[]\n")


def read_captions(path: Path) -> dict[int, str]:
    """Read captions by picture id.

    Raises:
        DataError: The file is absent or not in the format, a picture has two captions, or a caption is empty or no
            string.
    """
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); remove it and caption again.") from error
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"image_id", "caption"} <= set(row) for row in rows
    ):
        raise DataError(f'{path} is not in COCO results format; expected [{{"image_id": 1, "caption": "..."}}, ...].')
    captions: dict[int, str] = {}
    for row in rows:
        image_id, caption = row["image_id"], row["caption"]
        if not isinstance(image_id, int) or isinstance(image_id, bool):
            raise DataError(f"{path} has the image_id {image_id!r}; expected an integer.")
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{path} has {caption!r} for picture {image_id}; expected a caption with some text.")
        if image_id in captions:
            raise DataError(f"{path} captions picture {image_id} twice; keep one of the two.")
        captions[image_id] = caption
    return captions


def match_captions(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]]
) -> tuple[list[int], list[str], list[list[str]]]:
    """Put captions and references of the same pictures side by side.

    Args:
        captions: caption by picture id.
        references: references by picture id; exactly the same ids.

    Returns:
        Ids ascending, their captions, their references: what `CIDEr.update` takes.

    Raises:
        DataError: A caption without references, or references without a caption.

    Example:
        >>> match_captions({7: "a cat", 2: "a dog"}, {2: ["dog"], 7: ["cat"]})
        ([2, 7], ['a dog', 'a cat'], [['dog'], ['cat']])
    """
    unknown, missing = sorted(captions.keys() - references.keys()), sorted(references.keys() - captions.keys())
    if unknown or missing:
        raise DataError(
            f"expected a caption for exactly the {len(references):,} pictures that have references, but "
            f"{len(missing):,} of them have none{_first(missing)} and {len(unknown):,} captions are of other pictures"
            f"{_first(unknown)}; the captions belong to another data set, split or limit."
        )
    ids = sorted(captions)
    return ids, [captions[key] for key in ids], [list(references[key]) for key in ids]


def _first(ids: Sequence[int]) -> str:
    return f" (the first is {ids[0]})" if ids else ""
