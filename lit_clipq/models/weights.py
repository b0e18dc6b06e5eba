"""Published and local weights: find, read without unpickling code, check and install."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.errors import ModelError
from lit_clipq.models.configs import MINI_NAMES, ModelConfig, close_matches

# Scalars that OpenAI's TorchScript archives carry beside the weights.
_ARCHIVE_SCALARS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class WeightsSource:
    """Where a model's weights come from.

    Attributes:
        path: A local file; None for published weights that are yet to be fetched.
        published: open_clip's entry of the tag; empty for a local file.
        tag: What the user gave.
    """

    path: Path | None
    published: dict[str, Any]
    tag: str


def find_weights(config: ModelConfig, pretrained: str, *, force_quick_gelu: bool) -> WeightsSource:
    """Tell tags from files and refuse weights that were trained with another activation; touches no network.

    Args:
        config: The model.
        pretrained: open_clip tag, local file or "mini".
        force_quick_gelu: Whether the user forced QuickGELU.

    Returns:
        The source.

    Raises:
        ModelError: For an unknown tag, a missing file, or weights that need the other activation.
    """
    import open_clip

    if Path(pretrained).is_file():
        path = Path(pretrained)
        if _is_openai_path(path) and not config.quick_gelu:
            raise _wrong_activation(config, pretrained)
        return WeightsSource(path, {}, pretrained)
    if pretrained == "mini":
        if config.name not in MINI_NAMES:
            raise ModelError(f"weights 'mini' exist for {', '.join(MINI_NAMES)} only, not for {config.name!r}")
        from lit_clipq import mini

        return WeightsSource(Path(mini.weights_path(config.name)), {}, pretrained)
    published = open_clip.get_pretrained_cfg(config.published, pretrained) if config.published else {}
    if not published:
        raise _unknown_weights(config, pretrained)
    trained_with_quick_gelu = published.get("quick_gelu", False)
    if trained_with_quick_gelu and not config.quick_gelu:
        raise _wrong_activation(config, pretrained)
    if force_quick_gelu and not trained_with_quick_gelu:
        raise ModelError(f"weights {pretrained!r} of {config.name} were trained with GELU; leave out force_quick_gelu")
    return WeightsSource(None, published, pretrained)


def fetch_weights(config: ModelConfig, source: WeightsSource) -> Path:
    """Return the local file of a source, downloading published weights that are not cached.

    Raises:
        ModelError: Where they cannot be fetched; says which file is missing and how to give it.
    """
    import open_clip

    if source.path is not None:
        return source.path
    try:
        return Path(open_clip.download_pretrained(source.published))
    except Exception as error:  # hub, HTTP and file system errors share no base class
        hub = source.published.get("hf_hub", "")
        repository, _, filename = hub.rpartition("/")
        wanted = f"{filename or 'open_clip_model.safetensors'} of the hub repository {repository}" if hub else None
        raise ModelError(
            f"weights {source.tag!r} of {config.name} are neither cached nor reachable: missing "
            f"{wanted or source.published.get('url')}; fetch that file where there is a network and give its path "
            f"(--model.pretrained FILE): {error}"
        ) from error


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Read a weights file without executing anything in it.

    Args:
        path: `.safetensors`, a `torch.save` file of tensors, or a TorchScript archive.

    Returns:
        Tensors by name without a leading "module.", and whether the file is OpenAI's TorchScript archive.

    Raises:
        ModelError: For a missing or damaged file, or one that holds anything but tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    archive = False
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        elif _is_torchscript(path):
            archive = True
            content = dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"weights file {path} does not exist") from None
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ModelError(
            f"weights file {path} is damaged or no safetensors, state-dict or TorchScript file ({reason}); "
            "fetch it again"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"weights file {path} holds no state dict; expected a mapping of names to tensors")
    openai = archive and all(name in content for name in _ARCHIVE_SCALARS)
    state = {name: tensor for name, tensor in content.items() if not (openai and name in _ARCHIVE_SCALARS)}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state, openai


def load_weights(model: nn.Module, config: ModelConfig, path: Path) -> None:
    """Read a weights file and install it; every tensor must fit.

    Raises:
        ModelError: For an unreadable file, names or shapes that do not fit, non-finite values, or OpenAI's weights on a
            model without QuickGELU.
    """
    state, openai = read_state_dict(path)
    if openai and not config.quick_gelu:
        raise _wrong_activation(config, str(path))
    check_finite(state, str(path))
    state = _adapt_names(model, state)
    expected = model.state_dict()
    for name in expected.keys() - state.keys():
        if name.endswith("num_batches_tracked"):  # counts training steps only
            state[name] = expected[name]
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if missing or unexpected or misshapen:
        parts = (
            (len(missing), "missing", missing),
            (len(unexpected), "unexpected", unexpected),
            (len(misshapen), "misshapen", misshapen),
        )
        details = ", ".join(f"{count} {what} (first: {names[0]})" for count, what, names in parts if count)
        raise ModelError(f"weights file {path} does not fit model {config.name!r}: {details}; check the model name")
    model.load_state_dict(state)


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Check that weights are finite.

    Args:
        state: Tensors by name; integer ones pass.
        where: What to call their origin.

    Raises:
        ModelError: Names the first tensor with a NaN or an infinity, and how many values are affected.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{where}: tensor {name!r} holds {count} non-finite of {tensor.numel()} values (NaN or Inf)"
            )


def _adapt_names(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring third-party and older layouts to the model's own, as open_clip does."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if name in state and own is not None and own.numel() == state[name].numel():
            state[name] = state[name].reshape(own.shape)
    state.pop("text.transformer.embeddings.position_ids", None)  # no longer a buffer in transformers >= 4.31
    resize_pos_embed(state, model)
    if "positional_embedding" in state or "text.positional_embedding" in state:
        resize_text_pos_embed(state, model)
    return state


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _is_openai_path(path: Path) -> bool:
    """Whether a path says that its weights are OpenAI's: in the file's name, or in the hub repository's."""
    return "openai" in path.stem.lower() or any(
        part.lower().endswith((".openai", "_openai")) for part in path.parts[:-1]
    )


def _wrong_activation(config: ModelConfig, pretrained: str) -> ModelError:
    import open_clip

    other = f"{config.published}-quickgelu"
    hint = (
        f"use the model name {other!r}"
        if other in open_clip.list_models()
        else 'set "quick_gelu": true in the configuration'
    )
    return ModelError(
        f"weights {pretrained!r} were trained with QuickGELU, but model {config.name!r} uses GELU, which lowers its "
        f"accuracy; {hint}"
    )


def _unknown_weights(config: ModelConfig, pretrained: str) -> ModelError:
    import open_clip

    if config.published is None:
        return ModelError(f"weights file {pretrained!r} does not exist; a configuration file has no published weights")
    if Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt") or "/" in pretrained:
        return ModelError(f"weights file {pretrained!r} does not exist; give an existing file or a published tag")
    tags = open_clip.list_pretrained_tags_by_model(config.published)
    return ModelError(
        f"unknown weights {pretrained!r} of {config.name}: published are {', '.join(tags) or 'none'}; close matches: "
        f"{close_matches(pretrained, tags)}; a local file can be given as well"
    )
