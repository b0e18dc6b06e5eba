"""Caption files: COCO JSON, Karpathy's splits, and the tables of Flickr8k and Flickr30k."""

import contextlib
import gzip
import io
import json
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datamodules.images import Picture, composed, is_plain_relative, paths_inside
from lit_clipq.errors import DataError

TABLE_NAMES = ("captions.txt", "results.csv", "results_20130124.token", "Flickr8k.token.txt")
KARPATHY_NAMES = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")
KARPATHY_TRAIN = frozenset({"train", "restval"})


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file, bare, compressed (.gz), or alone in an archive (.zip).

    Args:
        path: The file.
        object_hook: What becomes of each object, innermost first; keeps large files small in memory.

    Raises:
        DataError: The file is absent, unreadable, truncated or no JSON, or an archive does not hold exactly one.
    """
    try:
        return json.loads(_unpacked(path), object_hook=object_hook)
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); it may be truncated: fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); it may be truncated: fetch it again.") from error


def _unpacked(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".json") and not n.startswith("__MACOSX/")]
        if len(names) != 1:
            raise DataError(f"{path} holds {len(names)} JSON files, expected one; unpack it by hand.")
        return archive.read(names[0])


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file.

    Raises:
        DataError: The file is absent, unreadable or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # str.splitlines would split at U+0085 and others
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}).") from error


def read_coco_captions(
    annotations: Path, images: Path, captions_per_image: int | None = None, gaps: Counter[str] | None = None
) -> list[Picture]:
    """Read a caption file in COCO format.

    Args:
        annotations: JSON with `images` (id, file_name) and `annotations` (id, image_id, caption).
        images: Folder that `file_name` is relative to.
        captions_per_image: How many captions of a picture to take, in the order of the file; None for all.
        gaps: Counts what is left out; None leaves nothing out. See `with_captions`.

    Returns:
        Pictures in the order of the file; the files need not exist.

    Raises:
        DataError: Malformed JSON, pictures without captions, captions without a picture, names that leave `images`.
    """
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = read_json(annotations)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # createIndex prints
            coco.createIndex()
        listed = [(entry["id"], entry["file_name"]) for entry in coco.dataset["images"]]
        captions = {key: [row["caption"] for row in rows] for key, rows in coco.imgToAnns.items()}
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{annotations} is not in COCO caption format ({error!r} in `images` or `annotations`)."
        ) from error
    orphans = captions.keys() - coco.imgs.keys()
    if orphans:
        raise DataError(
            f"{annotations} has captions of {len(orphans):,} pictures that it does not list "
            f"(image_id {some(orphans)}); add them to `images` or remove the captions."
        )
    if len(coco.imgs) != len(listed):
        raise DataError(f"{annotations} lists {len(listed) - len(coco.imgs):,} picture ids twice; ids must be unique.")
    paths = paths_inside(images, [str(name) for _, name in listed], annotations)
    rows = [captions.get(key, []) for key, _ in listed]
    return with_captions(paths, rows, annotations, [key for key, _ in listed], captions_per_image, gaps)


def read_karpathy(
    path: Path,
    folder: Path,
    splits: Container[str],
    captions_per_image: int | None = None,
    gaps: Counter[str] | None = None,
) -> list[Picture]:
    """Read rows of a Karpathy split file (`dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`).

    Args:
        path: The JSON file.
        folder: Folder of the pictures; where a row has a `filepath` (COCO: val2014, train2014), its parent.
        splits: Which of "train", "restval", "val", "test" to read.
        captions_per_image: How many captions of a picture to take, in the order of the file; None for all.
        gaps: Counts what is left out; None leaves nothing out. See `with_captions`.

    Returns:
        Pictures in the order of the file; the files need not exist.

    Raises:
        DataError: Malformed JSON, rows without captions, names that leave the folder.
    """
    try:
        rows = [row for row in read_json(path)["images"] if row["split"] in splits]
        names: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            names[row.get("filepath", "")].append(str(row["filename"]))
        captions = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
        ids = [row.get("cocoid", row.get("imgid")) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a Karpathy split file ({error!r} in `images`).") from error
    outside = [part for part in names if part and not is_plain_relative(part)]
    if outside:
        raise DataError(f"{path} names the folder {outside[0]!r}, which leaves {folder}; expected a folder inside it.")
    found = {part: iter(paths_inside(folder / part, group, path)) for part, group in names.items()}
    if not rows:
        return []
    paths = [next(found[row.get("filepath", "")]) for row in rows]
    return with_captions(paths, captions, path, ids, captions_per_image, gaps)


def read_table(
    path: Path, images: Path, keep: Container[str] | None = None, gaps: Counter[str] | None = None
) -> list[Picture]:
    """Read a caption table of Flickr8k or Flickr30k, one caption a line.

    Formats: `image,caption` (with header, a caption may be quoted), `image_name| comment_number| comment` (with
    header), and `image#number<tab>caption`.

    Args:
        path: The table.
        images: Folder of the pictures.
        keep: Names of the pictures to read, composed (NFC); None for all.
        gaps: Counts what is left out; None leaves nothing out. See `with_captions`.

    Raises:
        DataError: A line that has no picture or no caption, or names that leave `images`.
    """
    lines = read_lines(path)
    first = lines[0] if lines else ""
    split = _split_token if "\t" in first else _split_pipe if "|" in first else _split_comma
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(lines[0 if "\t" in first else 1 :], start=1 if "\t" in first else 2):
        if not line.strip():
            continue
        name, caption = split(line)
        if not name or not (caption or gaps is not None):
            raise DataError(f"{path}, line {number}: expected a picture and its caption, got {line[:80]!r}.")
        if keep is None or composed(name) in keep:
            captions[name].append(caption)
    if keep is not None and not captions:
        return []
    return with_captions(paths_inside(images, captions, path), list(captions.values()), path, gaps=gaps)


def with_captions(
    paths: Sequence[Path],
    captions: Sequence[Sequence[Any]],
    source: Path,
    ids: Sequence[Any] | None = None,
    captions_per_image: int | None = None,
    gaps: Counter[str] | None = None,
) -> list[Picture]:
    """Pair pictures with their stripped captions, and with their ids where all have one.

    Args:
        paths: The pictures.
        captions: Those of each picture.
        source: The annotation file, for error messages.
        ids: Id of each picture; None where the file has none.
        captions_per_image: Take the first so many captions of a picture that have text; None for all.
        gaps: Where given, captions that are empty or no text are left out and counted under `blank_captions`, pictures
            without any caption under `pictures_without_captions`.

    Raises:
        DataError: No picture, a picture or an id listed twice; without `gaps` also a picture without captions, or a
            caption that is empty or no text.
    """
    if not paths:
        raise DataError(f"{source} lists no pictures; expected at least one.")
    twice = [path.name for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(f"{source} lists {len(twice):,} pictures more than once ({some(twice)}).")
    given = ids if ids is not None and all(isinstance(key, int) for key in ids) else [None] * len(paths)
    again = [key for key, count in Counter(given).items() if key is not None and count > 1]
    if again:
        raise DataError(f"{source} gives {len(again):,} ids to more than one picture ({some(again)}).")
    texts = [[text.strip() for text in row if isinstance(text, str) and text.strip()] for row in captions]
    if gaps is None:
        _check_no_gaps(paths, captions, texts, source)
    else:
        gaps["blank_captions"] += sum(map(len, captions)) - sum(map(len, texts))
        gaps["pictures_without_captions"] += sum(not row for row in texts)
    rows = zip(paths, texts, given, strict=True)
    return [Picture(path, tuple(row[:captions_per_image]), image_id=key) for path, row, key in rows if row]


def _check_no_gaps(
    paths: Sequence[Path], captions: Sequence[Sequence[Any]], texts: Sequence[Sequence[str]], source: Path
) -> None:
    """Insist on a caption for every picture, and on text in every caption.

    Raises:
        DataError: Says where there is none.
    """
    bare = [path.name for path, row in zip(paths, captions, strict=True) if not row]
    if bare:
        raise DataError(
            f"{source} lists {len(bare):,} pictures without captions ({some(bare)}); add captions, or leave such "
            "pictures out with --data.on_error skip."
        )
    blank = [path.name for path, row, kept in zip(paths, captions, texts, strict=True) if len(kept) < len(row)]
    if blank:
        raise DataError(
            f"{source} has captions that are empty or no text, for {some(blank)}; correct them, or leave them out with "
            "--data.on_error skip."
        )


def read_captioned_folder(folder: Path, gaps: Counter[str] | None = None) -> list[Picture]:
    """Read the captions of a folder whose layout is one of COCO's or Flickr's; empty where it has none.

    Train splits are preferred to others. Looked for, in this order: `annotations/captions_<split>.json` with pictures
    in `<split>/` or `images/`, a Karpathy split file, a caption table.

    Args:
        folder: The folder.
        gaps: Counts what is left out; None leaves nothing out. See `with_captions`.
    """
    files = sorted(folder.glob("annotations/captions_*.json"))
    files = [path for path in files if "train" in path.name] or files
    sources = [(path, find_folder(folder, (path.stem.removeprefix("captions_"), "images"))) for path in files]
    found = [picture for path, images in sources for picture in read_coco_captions(path, images, gaps=gaps)]
    karpathy = find_file(folder, KARPATHY_NAMES)
    if not found and karpathy:
        images = folder if karpathy.name == "dataset_coco.json" else find_flickr_images(folder)
        found = read_karpathy(karpathy, images, KARPATHY_TRAIN, gaps=gaps)
    table = find_file(folder, TABLE_NAMES)
    if not found and table:
        found = read_table(table, find_flickr_images(folder), gaps=gaps)
    return found


def find_file(root: Path, names: Iterable[str]) -> Path | None:
    """Return the first of these files in `root`, `root/annotations`, `root/karpathy` or `root/vqa`, or None."""
    candidates = (root / part / name for name in names for part in ("", "annotations", "karpathy", "vqa"))
    return next((path for path in candidates if path.is_file()), None)


def find_folder(root: Path, names: Iterable[str]) -> Path:
    """Return the first of these folders below `root`, or `root` itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def find_flickr_images(root: Path) -> Path:
    """Return the picture folder of a Flickr8k or Flickr30k copy, under one of its common names."""
    names = ("images", "Images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset")
    folder = find_folder(root, names)
    return folder if folder == root else find_folder(folder, names)  # copies with a folder of the same name inside


def _split_token(line: str) -> tuple[str, str]:
    key, _, caption = line.partition("\t")
    return key.rpartition("#")[0], caption.strip()


def _split_pipe(line: str) -> tuple[str, str]:
    name, _, rest = line.partition("|")
    number, bar, caption = rest.partition("|")
    if not bar:  # one line of the published table lacks its second bar
        number, _, caption = rest.strip().partition(" ")
    return name.strip(), caption.strip() if number.strip().isdigit() else ""


def _split_comma(line: str) -> tuple[str, str]:
    name, _, caption = line.partition(",")
    caption = caption.strip()
    if len(caption) > 1 and caption[0] == caption[-1] == '"':
        caption = caption[1:-1].replace('""', '"').strip()
    return name.strip(), caption


def some(items: Iterable[Any]) -> str:
    """Return the first three of them, for an error message."""
    shown = [str(item) for item in islice(items, 4)]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
