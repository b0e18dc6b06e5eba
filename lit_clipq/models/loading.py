"""Load any CLIP by name, configuration file or mini name, with published, local or random weights."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lit_clipq.errors import ModelError
from lit_clipq.models.configs import HUB_PREFIX, ModelConfig, build_model, resolve_config
from lit_clipq.models.preprocessing import Preprocessing, PreprocessingOptions, local_snapshot, make_preprocessing
from lit_clipq.models.snapshot import hub_folder
from lit_clipq.models.weights import check_finite, fetch_weights, find_weights, load_weights, tell_what_is_assumed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedCLIP:
    """A model and what prepares its input.

    Attributes:
        model: The open_clip model in eval mode.
        preprocessing: Image transform and tokenizer.
        name: The name it was loaded by.
        pretrained: Tag, file or folder of its weights; None for random weights.
        config: The configuration it was built from; None for a model that did not come from `load_clip`.
        precision: As in `load_clip`.
    """

    model: nn.Module
    preprocessing: Preprocessing
    name: str
    pretrained: str | None
    config: ModelConfig | None = None
    precision: str = "fp32"


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    quick_gelu: bool | None = None,
    preprocessing: PreprocessingOptions | None = None,
) -> LoadedCLIP:
    """Load a CLIP in eval mode.

    With `pretrained=None` or a local file nothing is fetched from a network, but for a name of the hub. Tokenizers that
    live on the hub are then taken from the local cache at their first use.

    Args:
        name: open_clip name, path of an open_clip configuration JSON, a folder with an `open_clip_config.json` (its
            path, or `local-dir:FOLDER`), `hf-hub:OWNER/NAME`, or a mini name ("mini-vit", "mini-resnet",
            "mini-vit-outlier", "mini-resnet-outlier"). A relative `text_cfg.tokenizer_kwargs.bpe_path` in a JSON is
            relative to that JSON.
        pretrained: open_clip tag, local file (`.safetensors`, a state dict in `.pt` or `.bin`, alone or in a training
            checkpoint, OpenAI's TorchScript `.pt`), a folder with one, "mini", or None: the weights of a folder or of
            the hub's repository where `name` is one, else random ones from torch's global generator. The layout of
            transformers' CLIP and SigLIP is converted.
        precision: "fp32", "fp16", "bf16" (normalisations stay float32), "pure_fp16" or "pure_bf16".
        device: Where the model is put.
        quick_gelu: Whether the towers use QuickGELU; None leaves it to the configuration, and an error is raised where
            the weights say otherwise.
        preprocessing: How pictures are prepared; what it leaves open is as published with the weights, or as the
            configuration beside them says. What neither tells is assumed with a warning.

    Returns:
        Model, preprocessing and names.

    Raises:
        ModelError: For an unknown name or tag (with close matches), weights that are missing, damaged, non-finite or do
            not fit, that hold objects beside tensors, or were trained with another activation than the model has.
    """
    config = resolve_config(name, quick_gelu=quick_gelu)
    if pretrained is None and config.folder is not None:
        if name.startswith(HUB_PREFIX):
            hub_folder(name.removeprefix(HUB_PREFIX), weights=True)
        pretrained = str(config.folder)
    source = None if pretrained is None else find_weights(config, pretrained, quick_gelu=quick_gelu)
    download = source is not None and source.path is None
    chosen = {} if preprocessing is None else preprocessing.chosen()
    known = {} if source is None else source.evidence.preprocess
    config = replace(config, preprocess={**config.preprocess, **known, **chosen})
    path = None if source is None else fetch_weights(config, source)
    loaded = build_clip(config, pretrained, precision=precision, download=download)
    if path is None or source is None:
        logger.info("model %s has random weights", name)
    else:
        told = load_weights(loaded.model, config, path, quick_gelu=quick_gelu)
        tell_what_is_assumed(config, source, known=told or quick_gelu is not None, chosen=chosen)
    check_finite(loaded.model.state_dict(), f"model {name}")
    loaded.model.to(device)
    return loaded


def build_clip(
    config: ModelConfig, pretrained: str | None, *, precision: str = "fp32", download: bool = False
) -> LoadedCLIP:
    """Build the model of a configuration with random weights, in eval mode on the CPU, and its preprocessing.

    Args:
        config: See `resolve_config`.
        pretrained: Where the weights that it is going to hold come from.
        precision: As in `load_clip`.
        download: Whether the hub may be asked for configurations and tokenizers.

    Raises:
        ModelError: For a configuration that cannot be built.
    """
    local = _with_local_text_model(config, download=download)
    model: Any = build_model(local, precision)
    preprocessing = make_preprocessing(local, model.visual.image_size, download=download)
    return LoadedCLIP(model.eval(), preprocessing, config.name, pretrained, config, precision)


def _with_local_text_model(config: ModelConfig, *, download: bool) -> ModelConfig:
    """Point a hub text tower at the local copy of its configuration, so that building it asks no network.

    Raises:
        ModelError: Where there is no local copy and nothing may be fetched.
    """
    text_cfg = config.model["text_cfg"]
    repository = text_cfg.get("hf_model_name")
    if not repository:
        return config
    folder = local_snapshot(repository, ("config.json",))
    if folder is None:
        if download:
            return config
        raise ModelError(
            f"the text tower of {config.name} needs config.json of the hub repository {repository}, which is not in "
            f"the local cache; run `hf download {repository} config.json` where the hub can be reached"
        )
    return replace(config, model={**config.model, "text_cfg": {**text_cfg, "hf_model_name": folder}})
