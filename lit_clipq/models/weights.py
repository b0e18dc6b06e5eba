"""Published and local weights: find, check that they suit the model, and install."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.errors import ModelError
from lit_clipq.models.configs import MINI_NAMES, ModelConfig, close_matches, published_preprocessing
from lit_clipq.models.layouts import adapted, unwrapped
from lit_clipq.models.snapshot import Evidence, evidence_beside, weights_in
from lit_clipq.models.weights_file import WEIGHTS_SUFFIXES, read_weights_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsSource:
    """Where a model's weights come from.

    Attributes:
        path: A local file; None for published weights that are yet to be fetched.
        published: open_clip's entry of the tag; empty for a local file.
        tag: What the user gave.
        evidence: What is known about them without reading them.
    """

    path: Path | None
    published: dict[str, Any]
    tag: str
    evidence: Evidence


def find_weights(config: ModelConfig, pretrained: str, *, quick_gelu: bool | None) -> WeightsSource:
    """Tell tags from files and refuse weights that were trained with another activation; touches no network.

    Args:
        config: The model.
        pretrained: open_clip tag, local file, folder with one, or "mini".
        quick_gelu: What the user said about the activation; None for nothing. It decides over what lies beside a file.

    Returns:
        The source.

    Raises:
        ModelError: For an unknown tag, a missing file, or weights that need the other activation.
    """
    import open_clip

    path = Path(pretrained).expanduser()
    if path.is_file():
        return _local_source(config, path, pretrained, quick_gelu)
    if pretrained == "mini":
        if config.name not in MINI_NAMES:
            raise ModelError(f"weights 'mini' exist for {', '.join(MINI_NAMES)} only, not for {config.name!r}")
        from lit_clipq import mini

        path = Path(mini.weights_path(config.name))
        return WeightsSource(path, {}, pretrained, Evidence(config.quick_gelu, config.preprocess, "mini"))
    published = open_clip.get_pretrained_cfg(config.published, pretrained) if config.published else {}
    if not published and path.is_dir():
        return _local_source(config, weights_in(path), pretrained, quick_gelu)
    if not published:
        raise _unknown_weights(config, pretrained)
    trained_with_quick_gelu = bool(published.get("quick_gelu", False))
    if quick_gelu is not None and quick_gelu != trained_with_quick_gelu:
        raise ModelError(
            f"weights {pretrained!r} of {config.name} were trained with {_name(trained_with_quick_gelu)}; leave out "
            "--model.quick_gelu"
        )
    if trained_with_quick_gelu:
        check_activation(config, trained_with_quick_gelu, pretrained, quick_gelu)
    return WeightsSource(None, published, pretrained, Evidence(trained_with_quick_gelu, published, "open_clip"))


def _local_source(config: ModelConfig, path: Path, tag: str, quick_gelu: bool | None) -> WeightsSource:
    evidence = evidence_beside(path, config.published)
    check_activation(config, evidence.quick_gelu, tag, quick_gelu)
    return WeightsSource(path, {}, tag, evidence)


def check_activation(config: ModelConfig, trained: bool | None, pretrained: str, quick_gelu: bool | None) -> None:
    """Compare the activation that weights were trained with to the model's.

    Args:
        config: The model, with what the user said already in it.
        trained: Whether they were trained with QuickGELU; None for unknown.
        pretrained: What to call them.
        quick_gelu: What the user said; it decides, with a warning where the weights say otherwise.

    Raises:
        ModelError: They differ, and the user said nothing.
    """
    if trained is None or trained == config.quick_gelu:
        return
    if quick_gelu is None:
        raise _wrong_activation(config, pretrained, trained)
    logger.warning(
        "weights %s were trained with %s; %s is used as --model.quick_gelu says",
        *(pretrained, _name(trained), _name(quick_gelu)),
    )


def tell_what_is_assumed(config: ModelConfig, source: WeightsSource, *, known: bool, chosen: Mapping[str, Any]) -> None:
    """Warn about what decides the result and is neither known nor given: preprocessing and activation of a file.

    Published weights of one architecture may differ in both. Nothing is said where all of them agree.

    Args:
        config: The model, with the preprocessing that is going to be used.
        source: Its weights.
        known: Whether the activation is known, from the file or from the user.
        chosen: Preprocessing options of the user.
    """
    if source.path is None or config.published is None:
        return
    assumed = []
    ways = published_preprocessing(config.published)
    if not source.evidence.preprocess and not chosen and len(ways) > 1:
        used = {**_default_preprocessing(), **{key: value for key, value in config.preprocess.items() if value}}
        told = ", ".join(f"{key} {used[key]}" for key in ("mean", "std", "interpolation", "resize_mode"))
        assumed.append(f"pictures are prepared with {told} (set --model.mean, std, interpolation or resize_mode)")
    if not known and source.evidence.quick_gelu is None and _activation_is_open(config.published):
        assumed.append(
            f"the towers use {_name(config.quick_gelu)} (weights of OpenAI, MetaCLIP and DFN need QuickGELU: set "
            "--model.quick_gelu)"
        )
    if assumed:
        logger.warning(
            "%s does not say how it was trained, and published weights of %s differ: %s",
            *(source.tag, config.published, "; ".join(assumed)),
        )


def _default_preprocessing() -> dict[str, Any]:
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg

    return asdict(PreprocessCfg())


def _activation_is_open(published: str) -> bool:
    """Whether an architecture has published weights of both activations."""
    import open_clip

    base = published.removesuffix("-quickgelu")
    names = [name for name in (base, f"{base}-quickgelu") if name in open_clip.list_models()]
    found = {
        bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
        for name in names
        for tag in open_clip.list_pretrained_tags_by_model(name)
    }
    return len(found) > 1


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


def load_weights(model: nn.Module, config: ModelConfig, path: Path, *, quick_gelu: bool | None = None) -> bool:
    """Read a weights file and install it; every tensor must fit.

    Args:
        model: The model.
        config: What it was built from.
        path: The file; see `read_weights_file`. Names may be wrapped, and those of transformers' CLIP or SigLIP.
        quick_gelu: What the user said about the activation.

    Returns:
        Whether the file itself says with which activation it was trained.

    Raises:
        ModelError: For an unreadable file, names or shapes that do not fit, non-finite values, or weights of the other
            activation.
    """
    content = read_weights_file(path)
    check_activation(config, content.quick_gelu, str(path), quick_gelu)
    where = f"weights file {path}"
    state = unwrapped(content.state, where)
    check_finite(state, str(path))
    state = adapted(model, state)
    expected = model.state_dict()
    for name in expected.keys() - state.keys():
        if name.endswith("num_batches_tracked"):  # counts training steps only
            state[name] = expected[name]
    _check_fit(where, config, expected, state)
    model.load_state_dict(state)
    return content.quick_gelu is not None


def _check_fit(where: str, config: ModelConfig, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check names and shapes.

    Raises:
        ModelError: Says what differs.
    """
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if len(missing) == len(expected):
        raise ModelError(
            f"{where} holds no CLIP: none of its {len(state)} tensors (first: {unexpected[0]}) has a name of model "
            f"{config.name!r} (first: {missing[0]}); give the weights of a whole CLIP (a checkpoint of a head belongs "
            "to --ckpt_path)"
        )
    if missing or unexpected or misshapen:
        parts = (
            (len(missing), "missing", missing),
            (len(unexpected), "unexpected", unexpected),
            (len(misshapen), "misshapen", misshapen),
        )
        details = ", ".join(f"{count} {what} (first: {names[0]})" for count, what, names in parts if count)
        raise ModelError(f"{where} does not fit model {config.name!r}: {details}; check the model name")


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


def _name(quick_gelu: bool) -> str:
    return "QuickGELU" if quick_gelu else "GELU"


def _wrong_activation(config: ModelConfig, pretrained: str, trained: bool) -> ModelError:
    import open_clip

    published = config.published or ""
    other = f"{published}-quickgelu" if trained else published.removesuffix("-quickgelu")
    hint = f"use the model name {other!r} or --model.quick_gelu {str(trained).lower()}"
    if other == published or other not in open_clip.list_models():
        hint = f'set "quick_gelu": {str(trained).lower()} in the configuration, or --model.quick_gelu'
    return ModelError(
        f"weights {pretrained!r} were trained with {_name(trained)}, but model {config.name!r} uses "
        f"{_name(not trained)}, which lowers its accuracy; {hint}"
    )


def _unknown_weights(config: ModelConfig, pretrained: str) -> ModelError:
    import open_clip

    if config.published is None:
        return ModelError(f"weights file {pretrained!r} does not exist; a configuration file has no published weights")
    if Path(pretrained).suffix in WEIGHTS_SUFFIXES or "/" in pretrained:
        return ModelError(f"weights file {pretrained!r} does not exist; give an existing file or a published tag")
    tags = open_clip.list_pretrained_tags_by_model(config.published)
    return ModelError(
        f"unknown weights {pretrained!r} of {config.name}: published are {', '.join(tags) or 'none'}; close matches: "
        f"{close_matches(pretrained, tags)}; a local file can be given as well"
    )
