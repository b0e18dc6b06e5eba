"""The folder that an export writes: names, versions, checksums."""

import hashlib
import json
import math
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
    except (OSError, ValueError, RecursionError) as error:
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
    try:
        _check_values(content)
    except (KeyError, TypeError, ValueError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{file} is damaged ({why}); export the model again") from error
    for name, expected in content["files"].items():
        listed = Path(path) / name
        if not listed.is_file():
            raise ModelError(f"the export in {path} is incomplete: {listed} does not exist; export the model again")
        if file_hash(listed) != expected:
            raise ModelError(f"{listed} was cut short or edited: its checksum is wrong; copy or export it again")
    return content


def _check_values(content: Mapping[str, Any]) -> None:
    """Check what is read of an `export.json`.

    Raises:
        KeyError: Something is absent.
        TypeError: A group of values is none.
        ValueError: A value of another type, or a file that no export has.
    """
    tokenizer, text = content["tokenizer"], content["towers"]["text"]
    needed = {PREPROCESS_FILE, *TOWER_FILES.values()} | ({TOKENIZER_FILE} if tokenizer["reason"] is None else set())
    listed = set(content["files"])
    if not needed <= listed <= FILES:
        raise ValueError(f"it must list the files {', '.join(sorted(needed))}, got {', '.join(sorted(listed)):.200}")
    expected: list[tuple[str, Any, type | tuple[type, ...]]] = [
        ("files", content["files"], dict),
        ("model.name", content["model"]["name"], str),
        ("logit_scale", content["logit_scale"], float),
        ("embedding_size", content["embedding_size"], int),
        ("saturates_without_exact_mode", content["saturates_without_exact_mode"], bool),
        ("towers.text.free_length", text["free_length"], bool),
        ("towers.text.end_token", text["end_token"], (int, type(None))),
        ("tokenizer.reason", tokenizer["reason"], (str, type(None))),
    ]
    if tokenizer["reason"] is None:
        expected += [
            ("tokenizer.context_length", tokenizer["context_length"], int),
            ("tokenizer.special", tokenizer["special"], list),
            ("tokenizer.clean", tokenizer["clean"], str),
        ]
    wrong = next((name for name, value, kind in expected if not isinstance(value, kind)), None)
    if wrong is not None:
        raise ValueError(f"{wrong} is of another type than an export has")
    if not math.isfinite(content["logit_scale"]):
        raise ValueError("logit_scale is not finite")
    if tokenizer["reason"] is None and (tokenizer["context_length"] < 2 or len(tokenizer["special"]) < 2):
        raise ValueError("a text must have room for its start and end")


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
