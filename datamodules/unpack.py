"""Unpack archives that are not trusted: nothing leaves the folder, nothing is a link, nothing is half-written."""

import contextlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from datamodules.images import is_plain_relative
from lit_clipq.errors import DataError

BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError, RuntimeError)


@dataclass(frozen=True)
class _Member:
    """One regular file in an archive."""

    name: str
    size_bytes: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, root: Path, prefixes: tuple[str, ...] = ()) -> None:
    """Unpack a zip or tar file into a folder.

    All members are examined before the first is written. They are unpacked into a temporary folder inside `root` and
    renamed from there, so that an interruption leaves nothing half-written. A file that is there already is replaced.
    One process at a time may unpack an archive.

    Args:
        archive: A zip file, or a tar file with any compression.
        root: Existing folder.
        prefixes: Unpack only members whose names begin so; empty for all.

    Raises:
        DataError: A damaged archive; a member that is absolute, goes up, is a link, a device or encrypted; too little
            disk for the content.
    """
    try:
        with _members(archive) as members:
            chosen = [member for member in members if not prefixes or member.name.startswith(prefixes)]
            needed = sum(member.size_bytes for member in chosen)
            free = shutil.disk_usage(root).free
            if needed > free:
                raise DataError(
                    f"Unpacking {archive} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; make room."
                )
            temporary = root / f".unpack-{archive.name}"
            shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed
            try:
                temporary.mkdir()
                for member in chosen:
                    _write(member, temporary / member.name)
                _move_content(temporary, root)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except BROKEN as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); remove it and fetch it again.") from error


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[list[_Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield _zip_members(file, archive)
    else:
        with tarfile.open(archive, "r:*") as file:
            yield _tar_members(file, archive)


def _zip_members(file: zipfile.ZipFile, archive: Path) -> list[_Member]:
    members = []
    for info in file.infolist():
        _require_inside(info.filename, archive)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(
                f"{archive} holds {info.filename!r}, a link or device; only files and folders are unpacked."
            )
        if info.flag_bits & 1:
            raise DataError(f"{archive} holds {info.filename!r}, which is encrypted; only plain files are unpacked.")
        if not info.is_dir():
            members.append(_Member(info.filename, info.file_size, partial(file.open, info)))
    return members


def _tar_members(file: tarfile.TarFile, archive: Path) -> list[_Member]:
    members = []
    for info in file:
        _require_inside(info.name, archive)
        if not (info.isreg() or info.isdir()):
            raise DataError(f"{archive} holds {info.name!r}, a link or device; only files and folders are unpacked.")
        if info.isreg():
            members.append(_Member(info.name, info.size, partial(_open_tar_member, file, info)))
    return members


def _open_tar_member(file: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = file.extractfile(info)
    if stream is None:
        raise tarfile.TarError(f"{info.name} has no content")
    return stream


def _require_inside(name: str, archive: Path) -> None:
    if not is_plain_relative(name):
        raise DataError(f"{archive} holds {name!r}, which would leave the folder it is unpacked into; do not use it.")


def _write(member: _Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)
    if path.stat().st_size != member.size_bytes:
        raise EOFError(f"{member.name} has {path.stat().st_size} bytes, expected {member.size_bytes}")


def _move_content(source: Path, target: Path) -> None:
    """Rename every entry of a folder into another one; folders that are in both are merged."""
    for entry in sorted(source.iterdir()):
        destination = target / entry.name
        if entry.is_dir() and destination.is_dir():
            _move_content(entry, destination)
        else:
            os.replace(entry, destination)
