"""The folder that an export writes: names, versions, checksums."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_clipq.errors import ModelError

FORMAT, FORMAT_VERSION = "lit_clipq integer export", 1
CONTENT_FILE, PREPROCESS_FILE, TOKENIZER_FILE = "export.json", "preprocess.json", "tokenizer.json"
TOWER_FILES = {"image": "image.onnx", "text": "text.onnx"}
FILES = frozenset({CONTENT_FILE, PREPROCESS_FILE, TOKENIZER_FILE, *TOWER_FILES.values()})


def read_export(path: Path | str) -> dict[str, Any]:
    """Read and check `export.json` and the files that it lists.

    Args:
        path: Folder of an export.

    Returns:
        The content of `export.json`.

    Raises:
        ModelError: If the folder is no export, was cut short or edited, or is of a version that this one does not read.
    """
    file = Path(path) / CONTENT_FILE
    if not file.is_file():
        raise ModelError(
            f"expected an export in {path}, but {file} does not exist; give a folder made by `lit-clipq export`"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged and cannot be read as JSON ({error}); export the model again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(
            f"{file} does not describe an export of this program; give a folder made by `lit-clipq export`"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{file} has format version {content.get('format_version')}, but this version of lit_clipq reads "
            f"{FORMAT_VERSION}; use the version that wrote it or export the model again"
        )
    if content.pop("checksum", None) != content_hash(content):
        raise ModelError(f"{file} was edited or damaged: its checksum is wrong; export the model again")
    for name, expected in content["files"].items():
        listed = Path(path) / name
        if not listed.is_file():
            raise ModelError(f"the export in {path} is incomplete: {listed} does not exist; export the model again")
        if file_hash(listed) != expected:
            raise ModelError(f"{listed} was cut short or edited: its checksum is wrong; copy or export it again")
    return content


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, whatever their order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
