"""Search pictures by text: embeddings of a folder of pictures in one array."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_clipq.errors import DataError
from lit_clipq.pictures import load_rgb, picture_suffixes
from lit_clipq.runtime.model import IntegerCLIP

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Hit:
    """A picture that was found."""

    path: Path
    score: float
    """Cosine similarity, -1 to 1."""


@dataclass(frozen=True)
class Index:
    """Pictures with their embeddings.

    Attributes:
        root: Folder that the pictures lie in.
        names: Paths below it.
        embeddings: float32 (n, D), of length 1 each.
        unread: Pictures that could not be read, with the reason.
        model: Which export made the embeddings.
    """

    root: Path
    names: tuple[str, ...]
    embeddings: Array
    unread: tuple[str, ...]
    model: str

    @classmethod
    def build(
        cls,
        model: IntegerCLIP,
        folder: Path | str,
        *,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Index":
        """Embed all pictures in a folder and the folders below it.

        Args:
            model: The export.
            folder: With pictures; links that lead out of it are left out.
            batch_size: Pictures in one run.
            progress: Told how many pictures are done, and of how many.

        Raises:
            DataError: If there is no picture that can be read.
        """
        root = Path(folder).resolve()
        found = [
            path for path in sorted(root.rglob("*")) if path.suffix.lower() in picture_suffixes() and path.is_file()
        ]
        paths = [path for path in found if path.resolve().is_relative_to(root)]
        names, unread, rows = [], [f"{path}: leads out of {root}" for path in found if path not in set(paths)], []
        for start in range(0, len(paths), batch_size):
            pictures = []
            for path in paths[start : start + batch_size]:
                try:
                    pictures.append(load_rgb(path))
                    names.append(path.relative_to(root).as_posix())
                except DataError as error:
                    unread.append(str(error))
            if pictures:
                rows.append(model.embed_images(pictures, batch_size=batch_size))
            if progress is not None:
                progress(min(start + batch_size, len(paths)), len(paths))
        if not names:
            raise DataError(f"expected pictures in {root}, found none that can be read; give another folder")
        return cls(root, tuple(names), np.concatenate(rows), tuple(unread), fingerprint(model))

    def search(self, model: IntegerCLIP, text: str, *, count: int = 10) -> list[Hit]:
        """Return the pictures that fit a text best, best first.

        Args:
            model: The export that made the index.
            text: What is looked for.
            count: How many pictures at most.

        Raises:
            DataError: If another export made the index.
        """
        if fingerprint(model) != self.model:
            raise DataError("this index was made by another export; build it again")
        scores = self.embeddings @ model.embed_texts([text])[0]
        ordered = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
        return [Hit(self.root / self.names[i], float(scores[i])) for i in ordered]

    def save(self, file: Path | str) -> None:
        """Write the index to one file (npz), whole or not at all."""
        file = Path(file)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "wb") as out:
                texts: dict[str, Any] = {
                    key: np.array(getattr(self, key), dtype=np.str_) for key in ("names", "unread")
                }
                np.savez(out, embeddings=self.embeddings, root=str(self.root), model=self.model, **texts)
            Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, file: Path | str) -> "Index":
        """Undo `save`.

        Raises:
            DataError: For a file that is no index.
        """
        try:
            with np.load(file, allow_pickle=False) as stored:
                names, unread = (tuple(map(str, stored[key])) for key in ("names", "unread"))
                root = Path(str(stored["root"]))
                return cls(root, names, stored["embeddings"], unread, str(stored["model"]))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{file} is no index of pictures ({error}); build it again") from error


def fingerprint(model: IntegerCLIP) -> str:
    """Return what tells an export's image tower from any other."""
    return hashlib.sha256(repr(sorted(model.content["files"].items())).encode()).hexdigest()
