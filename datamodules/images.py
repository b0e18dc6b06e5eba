"""Pictures on disk: which are there, which are whole, which names stay inside their folder."""

import hashlib
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lit_clipq.errors import DataError
from lit_clipq.pictures import absence, damage, load_rgb, picture_suffixes

logger = logging.getLogger(__name__)

VERIFY_CHUNK = 512
TEXT_SUFFIXES = frozenset({".csv", ".html", ".json", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"})
"""Of files beside pictures that are surely none."""


@dataclass(frozen=True)
class Picture:
    """One picture and what the data set says about it."""

    path: Path
    """The file. Two pictures of a data set never share it."""
    captions: tuple[str, ...] = ()
    """Captions, stripped, in the order of the annotation file; empty where the data set has none."""
    label: int | None = None
    """Class index, or None where the data set has no classes."""
    image_id: int | None = None
    """Id in the annotation file, different for every picture, or None where it gives none."""


class PictureDataset(Dataset):
    """Decode pictures on demand: index -> whatever `image` makes of the RGB picture.

    Args:
        paths: The files.
        image: Preprocessing of one PIL picture, e.g. to a float tensor (3, H, W).

    Raises:
        DataError: On access, where a file cannot be decoded.
    """

    def __init__(self, paths: Iterable[Path], image: Callable[[Image.Image], Tensor]) -> None:
        self.paths = [str(path) for path in paths]
        self.image = image

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.image(load_rgb(self.paths[index]))


class EvaluationDataset(Dataset):
    """Samples `{"images", "image_ids"}`, with `"labels"` where the pictures have them; the id is the index.

    Args:
        pictures: The evaluation, in order.
        image: Preprocessing of one PIL picture.
    """

    def __init__(self, pictures: Sequence[Picture], image: Callable[[Image.Image], Tensor]) -> None:
        self.decoded = PictureDataset([picture.path for picture in pictures], image)
        self.labels = [picture.label for picture in pictures]

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        sample: dict[str, Tensor | int] = {"images": self.decoded[index], "image_ids": index}
        label = self.labels[index]
        if label is not None:
            sample["labels"] = label
        return sample


def list_folder(folder: Path) -> dict[str, os.DirEntry]:
    """Return the entries of a folder by name; empty where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def are_files(paths: Iterable[Path]) -> list[bool]:
    """Tell for each path whether it is a file, with one directory listing per folder."""
    listings: dict[Path, dict[str, os.DirEntry]] = {}
    found = []
    for path in paths:
        if path.parent not in listings:
            listings[path.parent] = list_folder(path.parent)
        entry = listings[path.parent].get(path.name)
        found.append(entry is not None and entry.is_file())
    return found


def list_pictures(folder: Path, unread: Counter[str] | None = None) -> list[Path]:
    """Return all pictures below a folder, sorted by path. Hidden files and folders are passed over.

    Args:
        folder: Where to look.
        unread: Counts the files that are no pictures by their suffix; without it those that may be pictures are told in
            a warning.

    Raises:
        DataError: A folder that cannot be read.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if is_picture_name(name)]
        others.update(_kind(name) for name in names if not name.startswith(".") and not is_picture_name(name))
    if unread is not None:
        unread.update(others)
    elif doubtful := Counter({kind: count for kind, count in others.items() if kind not in TEXT_SUFFIXES}):
        logger.warning("files in %s that are not read: %s", folder, describe_unread(doubtful))
    return sorted(found)


def describe_unread(unread: Counter[str]) -> str:
    """Return suffixes with their counts, the most frequent first, as in ".heic 3, .txt 1"."""
    ordered = sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{suffix} {count:,}" for suffix, count in ordered[:6]) + (", ..." if len(ordered) > 6 else "")


def _kind(name: str) -> str:
    return Path(name).suffix.lower() or "(no suffix)"


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise DataError(f"Folder {error.filename} cannot be read ({error.strerror}).") from error


def is_picture_name(name: str) -> bool:
    """Tell whether a file name is that of a picture.

    Example:
        >>> is_picture_name("dog.JPEG"), is_picture_name(".dog.jpg"), is_picture_name("dog.txt")
        (True, False, False)
    """
    return not name.startswith(".") and Path(name).suffix.lower() in picture_suffixes()


def paths_inside(folder: Path, names: Iterable[str], source: Path) -> list[Path]:
    """Join file names from an annotation file to the folder they belong to. The files need not exist.

    A file may be a link to anywhere, as in the caches of the Hugging Face hub, DVC and git-annex. Names that differ
    from those on disk only in how Unicode composes a letter (NFC, NFD) are taken for the same.

    Args:
        folder: Folder of the pictures.
        names: Relative names with forward slashes.
        source: The annotation file, for error messages.

    Raises:
        DataError: A name is absolute, contains "..", or leads through a folder that is a link out of `folder`.
    """
    root = folder.resolve()
    found = _Names()
    parents: dict[str, Path] = {}
    paths = []
    for name in names:
        if not is_plain_relative(name):
            raise DataError(f"{source} names the picture {name!r}, which leaves {folder}; expected a name inside it.")
        parent, _, leaf = name.rpartition("/")
        if parent not in parents:
            parents[parent] = found.below(folder, parent)
            if not parents[parent].resolve().is_relative_to(root):
                raise DataError(f"{source} names the picture {name!r}, but {folder / parent} links out of {folder}.")
        paths.append(found.below(parents[parent], leaf))
    return paths


class _Names:
    """Names on disk, by any way to compose their letters; each folder is listed once."""

    def __init__(self) -> None:
        self._listings: dict[Path, dict[str, str]] = {}

    def below(self, folder: Path, name: str) -> Path:
        """Join a name with forward slashes; a part that is not there is joined as it is."""
        for part in filter(None, name.split("/")):
            folder = folder / part if part.isascii() else folder / self._on_disk(folder, part)
        return folder

    def _on_disk(self, folder: Path, name: str) -> str:
        if folder not in self._listings:
            self._listings[folder] = by_composition(sorted(list_folder(folder)))
        listing = self._listings[folder]
        return listing.get(name, listing.get(composed(name), name))


def composed(name: str) -> str:
    """Return a name with its letters composed (NFC), as most programs write them."""
    return unicodedata.normalize("NFC", name)


def by_composition(names: Iterable[str]) -> dict[str, str]:
    """Map names, as they are and composed, to the names; what is there exactly as written wins."""
    names = list(names)
    return {**{composed(name): name for name in names}, **{name: name for name in names}}


def is_plain_relative(name: str) -> bool:
    r"""Tell whether a name stays below the folder it is joined to, on any operating system.

    Example:
        >>> [is_plain_relative(name) for name in ("a/b.jpg", "../b.jpg", "/b.jpg", "C:\\b.jpg", "a\\..\\b.jpg", "")]
        [True, False, False, False, False, False]
    """
    if not set(name) & {"/", "\\", ":", "\0"}:
        return name not in ("", ".", "..")
    windows = PureWindowsPath(name)
    parts = PurePosixPath(name).parts
    outside = PurePosixPath(name).is_absolute() or windows.drive or windows.root
    return bool(parts) and not outside and ".." not in parts and ".." not in windows.parts and "\0" not in name


def usable_pictures(pictures: Sequence[Picture], on_error: str, limit: int | None) -> tuple[list[Picture], int]:
    """Keep the first `limit` pictures that exist and decode.

    Args:
        pictures: Pictures as the data set lists them.
        on_error: "raise": the first `limit` listed pictures must all be usable; "skip": unusable ones are passed over.
        limit: Number of pictures, or None for all.

    Returns:
        The usable pictures in the given order, and how many were passed over before `limit` was reached.

    Raises:
        DataError: Unusable pictures with on_error="raise", or no usable picture at all.
    """
    if on_error == "raise":
        kept, skipped = _insist(pictures[:limit]), 0
    else:
        kept, skipped = _select(pictures, len(pictures) if limit is None else limit)
    if not kept:
        example = f", e.g. {pictures[0].path}" if pictures else ""
        raise DataError(f"None of {len(pictures):,} pictures can be read{example}; check the data folder.")
    return kept, skipped


def _insist(pictures: Sequence[Picture]) -> list[Picture]:
    present = are_files(picture.path for picture in pictures)
    missing = [(p.path, absence(p.path)) for p, there in zip(pictures, present, strict=True) if not there]
    problems = missing or [(p.path, why) for p, why in zip(pictures, _damages(pictures, present), strict=True) if why]
    if problems:
        raise _unusable(problems, len(pictures))
    return list(pictures)


def _select(pictures: Sequence[Picture], limit: int) -> tuple[list[Picture], int]:
    present = are_files(picture.path for picture in pictures)
    kept: list[Picture] = []
    skipped = 0
    for start in range(0, len(pictures), VERIFY_CHUNK):
        chunk = pictures[start : start + VERIFY_CHUNK]
        for picture, why in zip(chunk, _damages(chunk, present[start : start + VERIFY_CHUNK]), strict=True):
            if why is None:
                kept.append(picture)
            else:
                skipped += 1
            if len(kept) == limit:
                return kept, skipped
    return kept, skipped


def _damages(pictures: Sequence[Picture], present: Sequence[bool]) -> list[str | None]:
    """What is wrong with each picture, or None; files known to be absent are not opened."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda p, there: damage(p.path) if there else absence(p.path), pictures, present))


def _unusable(problems: Sequence[tuple[Path, str]], listed: int) -> DataError:
    path, reason = problems[0]
    others = "".join(f", {other.name}" for other, _ in problems[1:4]) + (" ..." if len(problems) > 4 else "")
    more = f" ({len(problems):,} such of {listed:,} pictures{others})" if len(problems) > 1 else ""
    return DataError(
        f"Picture {path} {reason}{more}; supply the file, or pass --data.on_error skip to leave such pictures out."
    )


class ContentIndex:
    """Finds files of equal content among a fixed set, hashing only those of equal size.

    Args:
        paths: The set. Files are looked at only when a candidate of the same size is asked about.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._by_size: dict[int, list[Path]] = defaultdict(list)
        self._digests: dict[Path, bytes] = {}
        for path in paths:
            self._by_size[os.stat(path).st_size].append(path)

    def twin(self, path: Path) -> Path | None:
        """Return the member that is the same file as `path`, or a copy of it, or None."""
        for member in self._by_size.get(os.stat(path).st_size, ()):
            if os.path.samefile(member, path) or self._digest(member) == self._digest(path):
                return member
        return None

    def _digest(self, path: Path) -> bytes:
        if path not in self._digests:
            self._digests[path] = hashlib.sha256(path.read_bytes()).digest()
        return self._digests[path]
