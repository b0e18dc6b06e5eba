"""What prepares a model's input, as plain files for a process without torch."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_clipq.errors import ConfigError
from lit_clipq.models import LoadedCLIP
from lit_clipq.runtime.preprocess import ImageTransform
from lit_clipq.runtime.tokenizer import build_tokenizer


def image_transform(loaded: LoadedCLIP) -> ImageTransform:
    """Return how the model's pictures are prepared.

    Raises:
        ConfigError: If the model did not come from `load_clip`.
    """
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    if loaded.config is None:
        raise ConfigError(f"model {loaded.name!r} has no configuration to export; load it with `load_clip`")
    size: Any = loaded.model.visual.image_size  # type: ignore[union-attr]
    chosen = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), loaded.config.preprocess), {"size": size})
    values: Mapping[str, Any] = asdict(PreprocessCfg(**chosen))
    size = values["size"]
    return ImageTransform(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        interpolation=values["interpolation"],
        resize_mode=values["resize_mode"],
        fill_color=values["fill_color"],
    )


def write_tokenizer(loaded: LoadedCLIP, file: Path) -> dict[str, Any]:
    """Write the model's tokenizer; returns what `Tokenizer` needs beside the file, or why there is none."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Any = loaded.preprocessing.tokenizer
    told: dict[str, Any] = {"context_length": loaded.preprocessing.context_length, "reason": None}
    if not isinstance(tokenizer, SimpleTokenizer):
        return {**told, "reason": f"a tokenizer of class {type(tokenizer).__name__} cannot be exported"}
    config = {} if loaded.config is None else loaded.config.model["text_cfg"].get("tokenizer_kwargs") or {}
    clean = config.get("clean", "lower")
    if tokenizer.reduction_fn is not None or clean not in ("lower", "whitespace"):
        return {**told, "reason": "a tokenizer that leaves out words or punctuation cannot be exported"}
    special = [tokenizer.decoder[index] for index in tokenizer.all_special_ids]
    merges = [pair for pair in tokenizer.bpe_ranks if len(pair) == 2]  # a vocabulary may end in an empty line
    build_tokenizer(tokenizer.encoder, merges, special).save(str(file))
    return {**told, "special": special, "clean": clean}
