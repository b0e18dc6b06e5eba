"""What `quantize` may be given: each misuse is one sentence, before anything is changed or read twice."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.errors import CalibrationError, ConfigError
from lit_clipq.nn.modules import QModule

_PAIR = "(images, texts), float (B, 3, H, W) and int64 (B, L), either may be None"
_SMALLEST_PICTURE = 8  # pixels; fewer in the last axis are channels


def check_model(roots: Mapping[str, Any]) -> None:
    """Check that networks can be quantized in place.

    Args:
        roots: Networks by name.

    Raises:
        ConfigError: No network; something else than a network; one that is quantized already, wrapped for several
            devices, compiled, a TorchScript, without values (meta device) or spread over devices.
    """
    if not roots:
        raise ConfigError("expected a network, or networks by name, got none")
    for name, root in roots.items():
        if not isinstance(root, nn.Module):
            hint = "; give its `.model`" if isinstance(getattr(root, "model", None), nn.Module) else ""
            raise ConfigError(f"expected a torch module as network {name!r}, got {type(root).__name__}{hint}")
        for path, module in root.named_modules():
            problem = _problem(module)
            if problem:
                raise ConfigError(f"{'.'.join(filter(None, (name, path)))} {problem}")
        _check_devices(name, root)


def _problem(module: nn.Module) -> str | None:
    """Say what keeps a module from being quantized, as the end of a sentence, or None."""
    kind = type(module).__name__
    if isinstance(module, QModule):
        return "is quantized already; load the model anew to quantize it otherwise"
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript, whose layers cannot be replaced; give the module it was made from"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or kind.startswith("FullyShardedData"):
        return f"is wrapped in {kind}; quantize what is inside (`.module`) and wrap it afterwards"
    if isinstance(module, torch._dynamo.OptimizedModule):
        return "is compiled; quantize what is inside (`._orig_mod`) and compile it afterwards"
    if module._compiled_call_impl is not None:
        return "is compiled in place; quantize a model that is not, and call `.compile()` afterwards"
    return None


def _check_devices(name: str, root: nn.Module) -> None:
    devices = {tensor.device for tensor in (*root.parameters(), *root.buffers())}
    if any(device.type == "meta" for device in devices):
        raise ConfigError(f"network {name!r} has tensors without values (meta device); load its weights first")
    if len(devices) > 1:
        told = ", ".join(sorted(map(str, devices)))
        raise ConfigError(f"network {name!r} is spread over {told}; move it to one device with `.to(device)`")


def check_batches(batches: Any, *, pairs: bool = True) -> list[Any]:
    """Read calibration batches into a list, and check what they are.

    Args:
        batches: Any iterable of batches; it is read once.
        pairs: Whether a batch has to be (images, texts), as the networks' own forward takes it; else anything but a
            tensor or a dict in the place of several batches is passed on.

    Returns:
        The batches.

    Raises:
        CalibrationError: None; one batch instead of several; with `pairs` a batch of another kind, pictures that are
            not prepared or texts that are no tokens.

    Example:
        >>> check_batches([(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None)])
        Traceback (most recent call last):
        ...
        lit_clipq.errors.CalibrationError: calibration batch 0 has pictures in torch.uint8; expected them prepared as \
the model wants them (floating point): apply `preprocessing.image` of the loaded model
    """
    _check_several(batches, pairs)
    found = list(batches)
    if not found:
        raise CalibrationError("the calibration set is empty; give at least one batch (calibration_samples >= 1)")
    for number, batch in enumerate(found) if pairs else ():
        _check_pair(f"calibration batch {number}", batch)
    return found


def _check_several(batches: Any, pairs: bool) -> None:
    """Refuse what is no series of batches."""
    if isinstance(batches, Mapping):
        keys = ", ".join(map(repr, list(batches)[:3]))
        raise CalibrationError(f"expected a list of batches, got a dict ({keys}); give a list of {_PAIR}")
    if isinstance(batches, Tensor) or (pairs and _is_pair_of_tensors(batches)):
        raise CalibrationError("expected a list of batches, got a single batch; put it into a list: [batch]")
    if isinstance(batches, str | bytes | Path) or not isinstance(batches, Iterable):
        raise CalibrationError(f"expected a list of batches, got {type(batches).__name__}; give a list of {_PAIR}")


def _is_pair_of_tensors(batches: Any) -> bool:
    return (
        isinstance(batches, tuple | list)
        and len(batches) == 2
        and all(part is None or isinstance(part, Tensor) for part in batches)
        and any(part is not None for part in batches)
    )


def _check_pair(which: str, batch: Any) -> None:
    if isinstance(batch, Mapping):
        keys = ", ".join(map(repr, list(batch)[:4]))
        raise CalibrationError(
            f"{which} is a dict ({keys}); expected {_PAIR}: give such pairs, or a `forward` that takes the dict"
        )
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = (
            f"{type(batch).__name__} of length {len(batch)}"
            if isinstance(batch, tuple | list)
            else type(batch).__name__
        )
        hint = "; give (images, None)" if isinstance(batch, Tensor) else ", or give a `forward` for other batches"
        raise CalibrationError(f"{which} is a {what}; expected {_PAIR}{hint}")
    images, texts = batch
    if images is None and texts is None:
        raise CalibrationError(f"{which} has neither pictures nor texts; expected {_PAIR}")
    if images is not None:
        _check_images(which, images)
    if texts is not None:
        _check_texts(which, texts)


def _check_images(which: str, images: Any) -> None:
    if not isinstance(images, Tensor):
        raise CalibrationError(
            f"{which} has pictures of type {type(images).__name__}; expected a tensor (B, 3, H, W): apply "
            "`preprocessing.image` of the loaded model to each and stack them"
        )
    if not images.is_floating_point():
        raise CalibrationError(
            f"{which} has pictures in {images.dtype}; expected them prepared as the model wants them (floating point): "
            "apply `preprocessing.image` of the loaded model"
        )
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3 or 0 in shape:
        hint = "; permute (B, H, W, 3)" if images.ndim == 4 and shape[3] == 3 and shape[1] >= _SMALLEST_PICTURE else ""
        raise CalibrationError(
            f"{which} has pictures of shape {shape}; expected (B, 3, H, W) with B of 1 or more{hint}"
        )


def _check_texts(which: str, texts: Any) -> None:
    if not isinstance(texts, Tensor):
        raise CalibrationError(
            f"{which} has texts of type {type(texts).__name__}; expected tokens int64 (B, L): apply "
            "`preprocessing.tokenizer` of the loaded model"
        )
    shape = tuple(texts.shape)
    if texts.is_floating_point() or texts.dtype == torch.bool:
        raise CalibrationError(f"{which} has texts in {texts.dtype}; expected tokens int64 (B, L)")
    if texts.ndim != 2 or 0 in shape:
        hint = "; labels play no part: give (images, None)" if texts.ndim == 1 else ""
        raise CalibrationError(f"{which} has texts of shape {shape}; expected tokens (B, L), B of 1 or more{hint}")
