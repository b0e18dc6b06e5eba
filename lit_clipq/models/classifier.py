"""Any timm classifier, with published, local or random weights, and timm's own preprocessing of it."""

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.models.configs import close_matches
from lit_clipq.models.layouts import unwrapped_as
from lit_clipq.models.loading import LoadedCLIP
from lit_clipq.models.preprocessing import Preprocessing
from lit_clipq.models.weights import check_finite
from lit_clipq.models.weights_file import read_weights_file

PUBLISHED = "timm"
"""Stands for the weights that timm publishes under a model's name."""


def load_classifier(name: str, pretrained: str | None = None, num_classes: int | None = None) -> LoadedCLIP:
    """Load a timm classifier in eval mode, on the CPU, in float32.

    Args:
        name: timm name, with or without the tag of its weights: `vit_tiny_patch16_224`,
            `deit_small_patch16_224.fb_in1k`.
        pretrained: `timm` for the weights published under that name, a local file (`.safetensors`, or a state dict in
            `.pth` or `.bin`, alone or in a training checkpoint), or None for random weights from torch's global
            generator.
        num_classes: Outputs; by default as many as the architecture was published with.

    Returns:
        Model, preprocessing and names. The picture transform is that of evaluation: resize, centre crop, mean and
        standard deviation as timm publishes them for the name. A classifier has no tokenizer; calling it is an error.

    Raises:
        ModelError: For an unknown name (with close matches), weights that are neither cached nor reachable, or that are
            damaged, not finite or do not fit.
        ConfigError: For `num_classes` below 1.

    Example:
        >>> import torch
        >>> load_classifier("vit_tiny_patch16_224", num_classes=10).model(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 10])
    """
    import timm

    if not timm.is_model(name):
        known = timm.list_models()
        raise ModelError(
            f"unknown classifier {name!r}: expected a timm name; close matches: {close_matches(name, known)}"
        )
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"expected num_classes of at least 1, got {num_classes}")
    file = None if pretrained in (None, PUBLISHED) else Path(str(pretrained))
    if file is not None and not file.is_file():
        raise ModelError(
            f"weights file {pretrained!r} does not exist; give an existing file, {PUBLISHED!r} for the weights that "
            "timm publishes, or null for random ones"
        )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model: Any = timm.create_model(name, pretrained=pretrained == PUBLISHED, **options)
    except Exception as error:  # hub, HTTP, file and architecture errors share no base class
        told = str(error).strip().partition("\n")[0]
        hint = "; fetch its weights where there is a network and give their path" if pretrained == PUBLISHED else ""
        raise ModelError(f"classifier {name!r} could not be made ({told}){hint}") from error
    if file is not None:
        _install(model, name, file)
    check_finite(model.state_dict(), f"classifier {name}")
    return LoadedCLIP(model.eval(), _preprocessing(model), name, pretrained)


def _install(model: nn.Module, name: str, path: Path) -> None:
    """Install the weights of a file; every tensor must fit."""
    expected = model.state_dict()
    state = unwrapped_as(read_weights_file(path).state, expected, f"weights file {path}")
    wrong = sorted(expected.keys() ^ state.keys())
    wrong += [key for key in sorted(expected.keys() & state.keys()) if state[key].shape != expected[key].shape]
    if wrong:
        raise ModelError(
            f"weights file {path} does not fit classifier {name!r}: {len(wrong)} tensors are missing, unexpected or of "
            f"another shape (first: {wrong[0]}); give the file that timm publishes for this name"
        )
    check_finite(state, str(path))
    model.load_state_dict(state)


def _preprocessing(model: nn.Module) -> Preprocessing:
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    fingerprint = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return Preprocessing(create_transform(**config, is_training=False), _no_tokenizer, 0, fingerprint)


def _no_tokenizer(texts: list[str]) -> NoReturn:
    raise ModelError(f"a classifier reads no texts, but got {len(texts)}; use a CLIP")
