"""The folder on disk: written whole or not at all, checked before it is believed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_clipq.checkpoint.identity import VOCABULARY_FILE
from lit_clipq.checkpoint.version1 import upgraded
from lit_clipq.errors import ConfigError, ModelError

FORMAT = "lit_clipq quantized model"
FORMAT_VERSION = 2
READABLE = (1, 2)
TENSORS_FILE, CONTENT_FILE = "model.safetensors", "quantization.json"
_FILES = {TENSORS_FILE, CONTENT_FILE, VOCABULARY_FILE}


def check_target(path: Path) -> None:
    """Check that an artefact can be written to `path`.

    Raises:
        ConfigError: If `path` is a file, a folder that is not empty and no artefact, or cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"expected a folder to save the quantized model in, but {path} is a file; give another path")
    if path.is_dir() and (others := sorted({child.name for child in path.iterdir()} - _FILES)):
        raise ConfigError(
            f"the folder {path} holds {others[0]}, which is no part of a quantized model; it is not overwritten, "
            "give another folder"
        )
    if path.is_dir() and any(path.iterdir()) and not _is_artefact(path):
        raise ConfigError(f"the folder {path} is no quantized model of this program; give another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.").cleanup()
    except OSError as error:
        raise ConfigError(f"the quantized model cannot be saved to {path}: {error}; give another folder") from error


def write_folder(path: Path, content: dict[str, Any], tensors: dict[str, Tensor], vocabulary: Path | None) -> None:
    """Write an artefact beside `path`, then move it there; an older artefact makes way only then.

    Args:
        path: The folder.
        content: What goes into the JSON; format and checksums are added.
        tensors: Contiguous tensors that share no memory.
        vocabulary: A file to copy in.

    Raises:
        ConfigError: See `check_target`; also if writing fails, for example on a full disk.
    """
    path = path.resolve()
    check_target(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        new = temporary / "new"
        new.mkdir()
        save_file(tensors, new / TENSORS_FILE)
        if vocabulary is not None:
            shutil.copyfile(vocabulary, new / VOCABULARY_FILE)
        files = {file.name: file_hash(file) for file in sorted(new.iterdir())}
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, "files": files, **content}
        text = json.dumps({**content, "checksum": _content_hash(content)}, indent=1)
        (new / CONTENT_FILE).write_text(text + "\n", encoding="utf-8")
        for file in new.iterdir():
            _make_ordinary(file)
        _move(new, path, temporary / "old")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the quantized model cannot be saved to {path}: {error}; give another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_content(path: Path) -> dict[str, Any]:
    """Read and check the JSON of an artefact.

    Raises:
        ModelError: If it is missing, damaged, edited, or of a format that this version does not know.
    """
    file = path / CONTENT_FILE
    if not file.is_file():
        raise ModelError(f"expected a quantized model in {path}, but {file} does not exist; give a folder made by save")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged and cannot be read as JSON ({error}); save the model again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(f"{file} does not describe a quantized model of this program; give a folder made by save")
    if content.get("format_version") not in READABLE:
        raise ModelError(
            f"{file} has format version {content.get('format_version')}, but this version of lit_clipq reads "
            f"{' and '.join(map(str, READABLE))}; use the version that wrote it ({_writer(content)}) or save the "
            "model again"
        )
    if content.pop("checksum", None) != _content_hash(content):
        raise ModelError(f"{file} was edited or damaged: its checksum is wrong; save the model again")
    return upgraded(content) if content["format_version"] == 1 else content


def check_files(path: Path, files: Mapping[str, str]) -> None:
    """Compare the files of an artefact with their recorded SHA-256.

    Raises:
        ModelError: If one is missing, cut short or edited.
    """
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise ModelError(f"the quantized model in {path} is incomplete: {file} does not exist; save it again")
        if file_hash(file) != expected:
            raise ModelError(f"{file} was cut short or edited: its checksum is wrong; copy or save it again")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an artefact whose files were checked."""
    return load_file(path / TENSORS_FILE)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_artefact(path: Path) -> bool:
    """Whether a folder says that it is an artefact, of any format version, intact or not."""
    try:
        return json.loads((path / CONTENT_FILE).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _writer(content: Mapping[str, Any]) -> str:
    versions = content.get("versions")
    return f"lit_clipq {versions.get('lit-clipq', '?')}" if isinstance(versions, dict) else "unknown"


def _make_ordinary(file: Path) -> None:
    """Flush a file to the disk and give it the permissions that any new file has."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _move(new: Path, path: Path, aside: Path) -> None:
    """Put `new` at `path`; what is there goes aside, and comes back if that fails."""
    if not path.exists():
        new.rename(path)
        return
    path.rename(aside)
    try:
        new.rename(path)
    except OSError:
        aside.rename(path)
        raise
