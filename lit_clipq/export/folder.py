"""The folder of an export: written beside its place, checked, then moved there, or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_clipq.errors import ConfigError
from lit_clipq.runtime.folder import CONTENT_FILE, FILES, FORMAT, FORMAT_VERSION, content_hash, file_hash


def check_target(path: Path, *, force: bool) -> None:
    """Check that an export can be written to `path`.

    Raises:
        ConfigError: If it exists and `force` is not given, if it holds anything but an export, or cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"expected a folder to export to, but {path} is a file; give another path")
    if path.is_dir():
        names = {child.name for child in path.iterdir()}
        if names - FILES or (names and CONTENT_FILE not in names):
            raise ConfigError(
                f"the folder {path} holds {min(names - FILES, default='files')} and no export; give another"
            )
        if names and not force:
            raise ConfigError(f"the export {path} exists; give another folder, or --force to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.").cleanup()
    except OSError as error:
        raise ConfigError(f"the export cannot be written to {path}: {error}; give another folder") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside `path` that takes its place when the context ends well, and vanishes otherwise.

    Raises:
        ConfigError: If writing fails, for example on a full disk.
    """
    path = path.resolve()
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if path.exists():
            path.rename(temporary / "old")
        try:
            new.rename(path)
        except OSError:
            if (temporary / "old").exists():
                (temporary / "old").rename(path)
            raise
    except OSError as error:
        raise ConfigError(f"the export cannot be written to {path}: {error}; give another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_content(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `export.json`: what is given, format, and checksums of the other files."""
    files = {file.name: file_hash(file) for file in sorted(folder.iterdir())}
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, "files": files, **content}
    text = json.dumps({**whole, "checksum": content_hash(whole)}, indent=1)
    (folder / CONTENT_FILE).write_text(text + "\n", encoding="utf-8")
