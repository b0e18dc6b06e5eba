"""From a model's name to its open_clip configuration, and from that to a model with random weights."""

import difflib
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_clipq.errors import ModelError
from lit_clipq.models.snapshot import OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG, hub_folder, read_json_file

MINI_NAMES = ("mini-vit", "mini-resnet", "mini-vit-outlier", "mini-resnet-outlier")
HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"
PREPROCESSING_KEYS = ("mean", "std", "interpolation", "resize_mode")
PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16")


@dataclass(frozen=True)
class ModelConfig:
    """An open_clip model configuration and where it came from.

    Attributes:
        name: Name or path as the user gave it.
        published: Name in open_clip's tables of weights; None for a configuration file.
        model: Keyword arguments of the model class (`embed_dim`, `vision_cfg`, `text_cfg`, ...).
        preprocess: Overrides of open_clip's default preprocessing.
        folder: Folder of a name that stands for a snapshot with weights; None for any other.
    """

    name: str
    published: str | None
    model: dict[str, Any]
    preprocess: dict[str, Any]
    folder: Path | None = None

    @property
    def quick_gelu(self) -> bool:
        """Whether the towers use QuickGELU."""
        return bool(self.model.get("quick_gelu", False))


def close_matches(word: str, known: Iterable[str]) -> str:
    """Return up to five of the known words that resemble `word`, comma-separated, best first, or "none"."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=5, cutoff=0.5)
    return ", ".join(by_lower[name] for name in found) or "none"


def resolve_config(name: str, *, quick_gelu: bool | None = None) -> ModelConfig:
    """Find the configuration of a model; touches no network but for a name of the hub.

    Args:
        name: open_clip name; path of an open_clip configuration JSON (bare or in the hub's form with `model_cfg` and
            `preprocess_cfg`); a folder with such an `open_clip_config.json`, as its path or as `local-dir:FOLDER`;
            `hf-hub:OWNER/NAME`, with `@REVISION` if wanted; or the name of a mini model.
        quick_gelu: Whether the towers use QuickGELU, whatever the configuration says; None leaves it to that.

    Returns:
        The configuration, with `tokenizer_kwargs.bpe_path` absolute.

    Raises:
        ModelError: For an unknown name, an unusable file or folder, or a repository that cannot be had.
    """
    config = _find_config(name)
    if quick_gelu is not None:
        config.model["quick_gelu"] = quick_gelu
    return config


def _find_config(name: str) -> ModelConfig:
    import open_clip  # imports transformers where installed

    if name in MINI_NAMES:
        from lit_clipq import mini

        return _read_json(name, Path(mini.config_path(name)))
    if name.startswith(HUB_PREFIX):
        return _read_folder(name, hub_folder(name.removeprefix(HUB_PREFIX), weights=False))
    if name.startswith(FOLDER_PREFIX):
        return _read_folder(name, Path(name.removeprefix(FOLDER_PREFIX)).expanduser())
    published = name.replace("/", "-")
    if published in open_clip.list_models():
        return ModelConfig(name, published, open_clip.get_model_config(published), _agreed_preprocessing(published))
    if Path(name).is_dir():
        return _read_folder(name, Path(name))
    if name.endswith(".json") or Path(name).is_file():
        return _read_json(name, Path(name))
    known = [*open_clip.list_models(), *MINI_NAMES]
    raise ModelError(
        f"unknown model {name!r}: expected an open_clip name, the path of a configuration JSON, {FOLDER_PREFIX}FOLDER, "
        f"{HUB_PREFIX}OWNER/NAME or one of {', '.join(MINI_NAMES)}; close matches: {close_matches(published, known)}"
    )


def _read_folder(name: str, folder: Path) -> ModelConfig:
    """Read a folder's configuration; a tokenizer that lies there takes the place of one on the hub.

    Raises:
        ModelError: There is no folder, or no configuration of open_clip's in it.
    """
    if not folder.is_dir():
        raise ModelError(f"model {name!r}: the folder {folder} does not exist; give one with {OPEN_CLIP_CONFIG}")
    file = folder / OPEN_CLIP_CONFIG
    if not file.is_file():
        hint = "give one with it"
        if (folder / TRANSFORMERS_CONFIG).is_file():
            hint = (
                "it is one of transformers': give the open_clip name of its architecture as --model.name, and this "
                "folder as --model.pretrained"
            )
        raise ModelError(f"model {name!r}: the folder {folder} holds no {OPEN_CLIP_CONFIG}; {hint}")
    config = replace(_read_json(name, file), folder=folder)
    tokenizer = any((folder / part).is_file() for part in ("tokenizer.json", "tokenizer_config.json"))
    if tokenizer and config.model["text_cfg"].get("hf_tokenizer_name"):
        config.model["text_cfg"]["hf_tokenizer_name"] = str(folder.resolve())
    return config


def build_model(config: ModelConfig, precision: str) -> nn.Module:
    """Build the model of a configuration with random weights, in train mode on the CPU; downloads no weights.

    Args:
        config: See `resolve_config`.
        precision: One of `PRECISIONS`; "fp16" and "bf16" keep normalisations and embeddings in float32.

    Returns:
        An `open_clip.CLIP`, `CustomTextCLIP` or `CoCa`.

    Raises:
        ModelError: For an unknown precision or a configuration that open_clip cannot build.
    """
    import open_clip

    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    options = deepcopy(config.model)
    custom_text = options.pop("custom_text", False) or "hf_model_name" in options["text_cfg"]
    kind: Any = open_clip.CLIP
    if custom_text:
        kind = open_clip.CoCa if "multimodal_cfg" in options else open_clip.CustomTextCLIP
    timm = "timm_model_name" in options["vision_cfg"]
    if timm:
        options["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in options["text_cfg"]:
        options["text_cfg"]["hf_model_pretrained"] = False
    try:
        model = kind(**options, cast_dtype=open_clip.get_cast_dtype(precision))
    except Exception as error:  # open_clip, timm and transformers raise whatever they like for a bad configuration
        raise ModelError(f"model {config.name!r} could not be built from its configuration: {error}") from error
    if kind is open_clip.CoCa:  # open_clip leaves this one uninitialised
        nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.width**-0.5)
    return _cast(model, precision, timm)


def _cast(model: nn.Module, precision: str, timm: bool) -> nn.Module:
    import open_clip
    from open_clip.transformer import LayerNormFp32

    if precision == "fp32":
        return model
    dtype = torch.float16 if precision.endswith("fp16") else torch.bfloat16
    if precision.startswith("pure_"):
        return model.to(dtype)
    if not timm:  # open_clip's mixed precision knows its own layers only
        open_clip.convert_weights_to_lp(model, dtype=dtype)
        return model
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, LayerNormFp32):
            module.float()
    return model


def _read_json(name: str, path: Path) -> ModelConfig:
    content = read_json_file(path)
    model = content.get("model_cfg", content)
    model = model if isinstance(model, dict) else {}
    wanted = (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict))
    missing = [key for key, kind in wanted if not isinstance(model.get(key), kind)]
    if missing:
        raise ModelError(
            f"model configuration {path} lacks {', '.join(missing)} of the right kind; expected an "
            "open_clip model configuration"
        )
    _make_bpe_path_absolute(model["text_cfg"], path)
    return ModelConfig(name, None, model, content.get("preprocess_cfg", {}) if "model_cfg" in content else {})


def _make_bpe_path_absolute(text_cfg: dict[str, Any], path: Path) -> None:
    options = text_cfg.get("tokenizer_kwargs") or {}
    if "bpe_path" not in options:
        return
    vocabulary = (path.resolve().parent / options["bpe_path"]).resolve()
    if not vocabulary.is_file():
        raise ModelError(f"model configuration {path} names the vocabulary {vocabulary}, which does not exist")
    options["bpe_path"] = str(vocabulary)


def published_preprocessing(published: str) -> list[dict[str, Any]]:
    """Return the distinct ways in which the published weights of a model were prepared for, by open_clip's names."""
    import open_clip

    distinct: list[dict[str, Any]] = []
    for tag in open_clip.list_pretrained_tags_by_model(published):
        cfg = open_clip.get_pretrained_cfg(published, tag)
        found = {key: cfg.get(key) for key in PREPROCESSING_KEYS}
        if found not in distinct:
            distinct.append(found)
    return distinct


def _agreed_preprocessing(published: str) -> dict[str, Any]:
    """Return the preprocessing that all published weights of a model share; empty where they differ or there are none.

    Local files say nothing about it, and for SigLIP the defaults would be wrong.
    """
    distinct = published_preprocessing(published)
    return distinct[0] if len(distinct) == 1 else {}
