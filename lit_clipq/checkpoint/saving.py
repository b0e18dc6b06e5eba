"""Save a quantized CLIP, and load it with nothing but its folder."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import lit_clipq
from lit_clipq.api import QuantizationReport
from lit_clipq.checkpoint.artefact import read_artefact
from lit_clipq.checkpoint.folder import write_folder
from lit_clipq.checkpoint.identity import ModelIdentity
from lit_clipq.checkpoint.tensors import collect_tensors, describe_modules, quantized_modules
from lit_clipq.errors import ConfigError
from lit_clipq.models import LoadedCLIP
from lit_clipq.models.loading import build_clip
from lit_clipq.nn.modules import Phase
from lit_clipq.recipes import Recipe

_PACKAGES = ("torch", "open_clip_torch", "timm", "safetensors")
_INITIALISERS = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"}


def save_quantized(
    path: Path | str,
    model: nn.Module | Mapping[str, nn.Module],
    *,
    report: QuantizationReport,
    recipe: Recipe,
    identity: ModelIdentity,
) -> None:
    """Save a quantized CLIP in a folder: `model.safetensors`, `quantization.json`, and a vocabulary of its own.

    An artefact that is already there is replaced, but only when the new one is complete.

    Args:
        path: The folder; absent, empty or an artefact.
        model: As it was given to `quantize`.
        report: What `quantize` returned.
        recipe: What `quantize` was given.
        identity: What `identify` returned before.

    Raises:
        ConfigError: If nothing was quantized, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from lit_clipq import identify, load_clip, load_quantized, quantize, recipes, save_quantized
        >>> clip, recipe = load_clip("mini-vit"), recipes.make_recipe("vanilla", embeddings=True)
        >>> identity = identify(clip)
        >>> batch = torch.rand(2, 3, 64, 64), torch.ones(2, 32, dtype=torch.long)
        >>> report = quantize(clip.model, [batch], recipe)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_quantized(folder, clip.model, report=report, recipe=recipe, identity=identity)
        ...     loaded = load_quantized(folder)
        >>> torch.equal(loaded.model.encode_text(batch[1]), clip.model.encode_text(batch[1]))
        True
    """
    roots = dict(model) if isinstance(model, Mapping) else {"clip": model}
    modules = quantized_modules(roots)
    if not modules or any(module.phase is not Phase.QUANTIZED for module in modules.values()):
        raise ConfigError("expected a quantized network to save; run `quantize` with less than 32 bits first")
    tensors, table = collect_tensors(roots)
    content = {
        "versions": _versions(),
        "model": identity.to_json(),
        "recipe": recipe.to_json(),
        "calibration": {"samples": report.samples, "seconds": report.seconds, "passes": report.passes},
        "stages": report.stages,
        "structure": [dict(entry) for entry in report.structure],
        "size_bytes": {"float": report.float_bytes, "quantized": report.quantized_bytes},
        "map": report.map.to_json(),
        "modules": describe_modules(roots),
        "tensors": table,
    }
    write_folder(Path(path), content, tensors, identity.vocabulary)


def load_quantized(path: Path | str, *, device: str | torch.device = "cpu") -> LoadedCLIP:
    """Load a quantized CLIP; outputs are bit-identical to those of the saved one on the same device.

    Neither the float weights nor calibration data nor a network are needed. A text tower from the hub needs that
    repository's configuration in the local cache, as in `load_clip`.

    Args:
        path: Folder written by `save_quantized`.
        device: Where the model is put.

    Returns:
        Model in eval mode, preprocessing, and the names of the float model.

    Raises:
        ModelError: For a folder that is no artefact, damaged or edited files, or a format this version does not know.
    """
    artefact = read_artefact(path)
    artefact.check_files()
    identity = artefact.identity
    with torch.random.fork_rng(devices=[]), _Uninitialised():
        loaded = build_clip(identity.model_config(), identity.pretrained, precision=identity.precision)
        loaded.model.to(device)
        artefact.load_into(loaded.model)
    return loaded


class _Uninitialised(TorchFunctionMode):
    """Leaves out random initial values: all of them are overwritten, and they take longer than the rest."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer an initialiser with the tensor as it is."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _versions() -> dict[str, str]:
    return {"lit-clipq": lit_clipq.__version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}
