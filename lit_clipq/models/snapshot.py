"""Folders with a model in them: snapshots of the hub, `local-dir:`, and what lies beside a weights file."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_clipq.errors import ModelError
from lit_clipq.models.weights_file import WEIGHTS_SUFFIXES

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
TRANSFORMERS_PREPROCESSING = "preprocessor_config.json"
# In the order in which they are looked for.
WEIGHTS_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors.index.json",
    "open_clip_pytorch_model.bin.index.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_QUICK_GELU = {"quick_gelu": True, "gelu": False, "gelu_new": False, "gelu_pytorch_tanh": False}
_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}
_HUB_CACHE = re.compile(r"models--(.+)")


@dataclass(frozen=True)
class Evidence:
    """What is known about weights beside their values."""

    quick_gelu: bool | None = None
    """Whether they were trained with QuickGELU; None where nothing says so."""
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    """How pictures were prepared, by open_clip's names; empty where nothing says so."""
    source: str = ""
    """What says so, in words."""


def read_json_file(path: Path) -> dict[str, Any]:
    """Read a JSON object in UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        ModelError: The file does not exist or is no JSON. Other content than an object counts as an empty one.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"model configuration {path} does not exist; give an open_clip name or an existing JSON"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model configuration {path} is not readable JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def weights_in(folder: Path) -> Path:
    """Return the weights file of a folder: one of the hub's usual names, or the only one there is.

    Raises:
        ModelError: The folder does not exist, or holds no weights file or several.
    """
    if not folder.is_dir():
        raise ModelError(f"the folder {folder} does not exist; give one with a weights file")
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS_SUFFIXES and path.is_file())
    if len(found) == 1:
        return found[0]
    told = f"several: {', '.join(path.name for path in found[:4])}" if found else "none"
    raise ModelError(
        f"the folder {folder} should hold one weights file ({', '.join(WEIGHTS_NAMES[:2])} ...), but it holds {told}; "
        "give the path of a file"
    )


def evidence_beside(path: Path, published: str | None) -> Evidence:
    """Read what lies beside a weights file: open_clip's or transformers' configuration, its place in the hub's cache.

    A folder of the hub's cache is named after its repository; where open_clip lists that repository for the model, the
    weights are the ones it lists. No other part of a path says anything.

    Args:
        path: The weights file.
        published: The model's name in open_clip's tables; None for a configuration file.

    Raises:
        ModelError: A configuration that is there and cannot be read.
    """
    folder = path.parent
    own = folder / OPEN_CLIP_CONFIG
    if own.is_file():
        content = read_json_file(own)
        model = content.get("model_cfg", content)
        quick_gelu = bool(model.get("quick_gelu", False)) if isinstance(model, dict) else None
        return Evidence(quick_gelu, content.get("preprocess_cfg") or {}, str(own))
    listed = _listed_repository(path, published)
    if listed is not None:
        return listed
    return _transformers_evidence(folder)


def _listed_repository(path: Path, published: str | None) -> Evidence | None:
    import open_clip

    repositories = [match[1].replace("--", "/", 1) for part in path.parts if (match := _HUB_CACHE.fullmatch(part))]
    if not repositories or published is None or "snapshots" not in path.parts:
        return None
    for tag in open_clip.list_pretrained_tags_by_model(published):
        cfg = open_clip.get_pretrained_cfg(published, tag)
        if cfg.get("hf_hub", "").rpartition("/")[0] == repositories[-1]:
            return Evidence(bool(cfg.get("quick_gelu", False)), cfg, f"the hub repository {repositories[-1]}")
    return None


def _transformers_evidence(folder: Path) -> Evidence:
    """Read transformers' `hidden_act` and its image processor's settings; what is not there stays unknown."""
    quick_gelu = None
    preprocess: dict[str, Any] = {}
    sources = []
    file = folder / TRANSFORMERS_CONFIG
    if file.is_file():
        content = read_json_file(file)
        if content.get("model_type") in ("clip", "siglip"):
            # what the file leaves out is transformers' default, which for CLIP is QuickGELU
            default = "quick_gelu" if content["model_type"] == "clip" else "gelu_pytorch_tanh"
            acts = {(content.get(f"{tower}_config") or {}).get("hidden_act", default) for tower in ("text", "vision")}
            quick_gelu = _QUICK_GELU.get(acts.pop()) if len(acts) == 1 else None
            sources.append(str(file))
    file = folder / TRANSFORMERS_PREPROCESSING
    if file.is_file():
        preprocess = _from_image_processor(read_json_file(file))
        sources.append(str(file))
    return Evidence(quick_gelu, preprocess, " and ".join(sources))


def _from_image_processor(content: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the settings of a transformers image processor; `size` stays the model's own."""
    found: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if isinstance(content.get(theirs), list):
            found[ours] = tuple(content[theirs])
    if content.get("resample") in _PILLOW_FILTERS:
        found["interpolation"] = _PILLOW_FILTERS[content["resample"]]
    size = content.get("size")
    if isinstance(size, dict):
        found["resize_mode"] = "shortest" if "shortest_edge" in size else "squash"
    elif isinstance(size, int):
        found["resize_mode"] = "shortest"
    return found


def hub_folder(repository: str, *, weights: bool) -> Path:
    """Return the local folder of a hub repository's snapshot, fetching what is not cached.

    Args:
        repository: `owner/name`, or `owner/name@revision`.
        weights: Whether the weights file is needed beside the configuration.

    Raises:
        ModelError: What is needed is neither cached nor reachable.
    """
    name, _, revision = repository.partition("@")
    config = _hub_file(name, (OPEN_CLIP_CONFIG,), revision or None)
    if weights:
        _hub_file(name, (WEIGHTS_NAMES[0], WEIGHTS_NAMES[2]), revision or None)
    return config.parent


def _hub_file(name: str, filenames: tuple[str, ...], revision: str | None) -> Path:
    """Return the first of these files of a repository that is cached, else the first that can be fetched."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for filename in filenames:
        cached = try_to_load_from_cache(name, filename, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    reasons = []
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename, revision=revision))
        except Exception as error:  # hub, HTTP and validation errors share no base class
            reasons.append(str(error).strip().partition("\n")[0])
    raise ModelError(
        f"the hub repository {name} is neither cached nor reachable: missing {' or '.join(filenames)}; run "
        f"`hf download {name}` where the hub can be reached, or give a folder with its files as local-dir:FOLDER "
        f"({reasons[0]})"
    )
