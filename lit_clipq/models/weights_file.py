"""Weights files as people keep them, read without executing anything in them."""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_clipq.errors import ModelError

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.json"
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Scalars that OpenAI's TorchScript archives carry beside the weights.
_ARCHIVE_SCALARS = ("input_resolution", "context_length", "vocab_size")
_LFS_POINTER = b"version https://git-lfs"
_PREFERRED_KEY = "state_dict"
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
)


@dataclass(frozen=True)
class FileContent:
    """The tensors of a weights file, under the names it gives them."""

    state: dict[str, Tensor]
    """Tensors by name."""
    quick_gelu: bool | None
    """Whether the file itself says that the network uses QuickGELU; None where it says nothing."""


def read_weights_file(path: Path) -> FileContent:
    """Read a weights file without executing anything in it; its content decides what it is, not its name.

    Args:
        path: safetensors, a `torch.save` file of tensors, alone or under a key of a training checkpoint, a TorchScript
            archive, or the index (`.index.json`) of a file in several parts.

    Returns:
        The tensors.

    Raises:
        ModelError: For a missing or damaged file, or one that holds objects beside tensors; says what it holds.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.name.endswith(INDEX_SUFFIX):
        return FileContent(_read_parts(path), None)
    quick_gelu = None
    try:
        if _is_safetensors(path):
            content: Any = load_file(path)
        elif _is_torchscript(path):
            content = dict(torch.jit.load(str(path), map_location="cpu").state_dict())
            quick_gelu = _activation_of_archive(path, content)
            content = {name: tensor for name, tensor in content.items() if name not in _ARCHIVE_SCALARS}
        else:
            with path.open("rb") as file:  # by name torch would go by the suffix
                content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"weights file {path} does not exist; give an existing file or a published tag") from None
    except (SafetensorError, *_UNREADABLE) as error:
        raise _unreadable(path, error) from error
    return FileContent(_state_dict_in(content, path), quick_gelu)


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Read a file in several parts, of which an index says which tensor lies where.

    Raises:
        ModelError: An index of another layout, a part that is absent or outside of its folder, or lacks a tensor.
    """
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = sorted({Path(part).name for part in places.values()})
        outside = [part for part in places.values() if Path(part).name != part]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of a weights file in parts ({error!r}); fetch it again") from error
    if outside:
        raise ModelError(f"{index} names the part {outside[0]!r}, which leaves its folder; expected names inside it")
    state: dict[str, Tensor] = {}
    for name in names:
        state.update(read_weights_file(index.parent / name).state)
    absent = sorted(places.keys() - state.keys())
    if absent:
        raise ModelError(f"{index} lists {absent[0]!r} and {len(absent) - 1} others that no part holds; fetch it again")
    return state


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict: the content itself, or what lies under a key of a training checkpoint.

    Raises:
        ModelError: There is none, or more than one and none of them under "state_dict".
    """
    if isinstance(content, Mapping) and _is_state_dict(content):
        return dict(content)
    found = {}
    if isinstance(content, Mapping):
        found = {str(key): value for key, value in content.items() if _is_state_dict(value)}
    key = _PREFERRED_KEY if _PREFERRED_KEY in found else next(iter(found), None)
    if key is None:
        raise ModelError(f"weights file {path} holds no state dict, but {_describe(content)}; give one that does")
    if len(found) > 1 and key != _PREFERRED_KEY:
        raise ModelError(
            f"weights file {path} holds state dicts under the keys {', '.join(map(repr, found))}, expected one; save "
            "the one you want in a file of its own"
        )
    others = ", ".join(repr(other) for other in found if other != key)
    if others:
        logger.warning("of %s the state dict under %r is taken, not the one under %s", path, key, others)
    return dict(found[key])


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"an object of type {type(content).__name__}"
    if not content:
        return "an empty mapping"
    kinds = [f"{key!r} ({type(value).__name__})" for key, value in list(content.items())[:4]]
    return f"the keys {', '.join(kinds)}" + (", ..." if len(content) > 4 else "")


def _unreadable(path: Path, error: Exception) -> ModelError:
    """Tell objects that are no tensors, and would need their pickle code run, from damage."""
    objects = foreign_objects(path, error)
    if objects:
        shown = ", ".join(objects[:3]) + (", ..." if len(objects) > 3 else "")
        return ModelError(
            f"weights file {path} holds objects that are no tensors ({shown}), and restoring them runs pickle code, "
            "which this program never does; expected tensors alone: where you trust the file, convert it with "
            f"`c = torch.load({str(path)!r}, weights_only=False)` and `torch.save(c['state_dict'], 'weights.pt')` "
            "(or c['model'], or c.state_dict() of a whole module)"
        )
    start = _first_bytes(path, len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return ModelError(f"weights file {path} is a pointer of Git LFS; fetch the file with git lfs pull")
    if _is_numpy_archive(path):
        return ModelError(
            f"weights file {path} holds NumPy arrays, as big_vision publishes them; give open_clip's file of that model"
        )
    if start[:1] == b"\x80" and not zipfile.is_zipfile(path):
        return ModelError(
            f"weights file {path} is a plain pickle, which would run its code, or a torch.save file cut short; "
            "expected safetensors, or a state dict written by torch.save"
        )
    reason = str(error).strip().partition("\n")[0].partition(". ")[0]
    return ModelError(
        f"weights file {path} is damaged or no safetensors, state-dict or TorchScript file ({reason}); fetch it again"
    )


def foreign_objects(path: Path, error: Exception) -> list[str]:
    """Return what torch refuses to restore from a file: classes and functions by name, from the opcodes alone.

    Args:
        path: The file.
        error: What `torch.load` raised with `weights_only=True`.

    Returns:
        Their names, at most the first in files of torch's older format; empty where the file is unreadable otherwise.
    """
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except _UNREADABLE:  # a file of torch's older format; the reader names the first one
        return re.findall(r"(?:Unsupported (?:global|class): GLOBAL|Unsupported class) ([\w.]+)", str(error))[:1]


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a JSON header, and that header."""
    start = _first_bytes(path, 9)
    plausible = len(start) == 9 and 2 <= int.from_bytes(start[:8], "little") <= path.stat().st_size
    return (plausible and start[8:] == b"{") or (path.suffix == ".safetensors" and not zipfile.is_zipfile(path))


def _is_numpy_archive(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _activation_of_archive(path: Path, content: Mapping[str, Any]) -> bool | None:
    """Read off a TorchScript archive's own source whether it multiplies by 1.702, as QuickGELU does.

    OpenAI's archives are known by three scalars as well.
    """
    with zipfile.ZipFile(path) as archive:
        sources = [archive.read(name) for name in archive.namelist() if name.endswith(".py")]
    if any(b"1.702" in source for source in sources) or all(name in content for name in _ARCHIVE_SCALARS):
        return True
    return False if any(b"gelu(" in source for source in sources) else None
