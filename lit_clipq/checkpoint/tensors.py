"""From a quantized network to tensors on disk and back."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_clipq.errors import ModelError
from lit_clipq.functional.packing import pack_codes, unpack_codes
from lit_clipq.nn.modules import Phase, QModule, QWeighted
from lit_clipq.nn.structure import replay
from lit_clipq.nn.swap import Layer, find_layers, swap, unswap

_WHOLE_WIDTHS = (8, 16)


def quantized_modules(roots: Mapping[str, nn.Module]) -> dict[str, QModule]:
    """Return the Q-modules by name, the root's name first; one that sits in several places once."""
    return {
        f"{root}.{name}": module
        for root, network in roots.items()
        for name, module in network.named_modules()
        if isinstance(module, QModule)
    }


def describe_modules(roots: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return class and quantizers of every Q-module, by name."""
    return {name: module.config() for name, module in quantized_modules(roots).items()}


def collect_tensors(roots: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors to store, on the CPU, and what each name of the state stands for.

    Returns:
        Tensors by name, codes packed, and {name: {"dtype", "shape"}} of the state they restore; with "bits" for packed
        codes, and {"same_as": name} alone for a name whose tensor is stored under another.
    """
    widths = {
        id(module.weight_codes): module.weight_quantizer.bits
        for module in quantized_modules(roots).values()
        if isinstance(module, QWeighted) and module.weight_codes is not None and module.weight_quantizer is not None
    }
    tensors: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    seen: dict[Any, str] = {}
    for name, value in _state(roots).items():
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in seen:
            table[name] = {"same_as": seen[place]}
            continue
        seen[place] = name
        table[name] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        bits = widths.get(id(value))
        if bits is not None and bits not in _WHOLE_WIDTHS:
            table[name]["bits"] = bits
            tensors[name] = pack_codes(value, bits).cpu()
        else:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return tensors, table


def restore_tensors(tensors: Mapping[str, Tensor], table: Mapping[str, Any]) -> dict[str, Tensor]:
    """Undo `collect_tensors`.

    Raises:
        ModelError: For tensors that are missing, left over, or not of the recorded type and shape.
    """
    stored = {name for name, entry in table.items() if "same_as" not in entry}
    _refuse_names("tensors that its quantization.json does not list", set(tensors) - stored)
    _refuse_names("no tensors of the name", stored - set(tensors))
    state: dict[str, Tensor] = {}
    for name in stored:
        entry, value = table[name], tensors[name]
        shape = tuple(entry["shape"])
        if "bits" in entry:
            try:
                value = unpack_codes(value, entry["bits"], shape)
            except ValueError as error:
                raise ModelError(f"the quantized model's tensor {name} is damaged: {error}; save it again") from error
        if str(value.dtype) != f"torch.{entry['dtype']}" or tuple(value.shape) != shape:
            raise ModelError(
                f"the quantized model's tensor {name} is {value.dtype} of shape {tuple(value.shape)}, expected "
                f"{entry['dtype']} of shape {shape}; save it again"
            )
        state[name] = value
    return {name: state[entry.get("same_as", name)] for name, entry in table.items()}


def install(
    roots: Mapping[str, nn.Module],
    modules: Mapping[str, Any],
    structure: Sequence[Mapping[str, Any]],
    state: Mapping[str, Tensor],
) -> None:
    """Swap Q-modules into explicit float networks, replay the structure, and give them the stored state.

    Args:
        roots: Float networks, BatchNorm folded and attention explicit; their layers stay float if this fails.
        modules: From `describe_modules`.
        structure: Of the report; see `lit_clipq.nn.structure`.
        state: From `restore_tensors`.

    Raises:
        ModelError: If a layer or tensor does not fit the networks.
    """
    layers = {layer.name: layer for layer in find_layers(roots)}
    _refuse_names("layers that the network has not", {name for name in modules if not _fits(modules, layers, name)})
    chosen = [layers[name] for name in modules]
    devices = {name: next(root.parameters()).device for name, root in roots.items()}
    swapped = swap(roots, chosen, lambda layer: _built(layer, modules[layer.name]))
    undo = None
    try:
        undo = replay(structure, swapped, roots)
        _check_tensors(roots, state)
        for root, network in roots.items():
            own = {name.partition(".")[2]: x for name, x in state.items() if name.partition(".")[0] == root}
            missing, unexpected = network.load_state_dict(own, strict=False)
            _refuse_names("tensors that the network has not", {f"{root}.{name}" for name in unexpected})
            _refuse_names("no tensors of the name", {f"{root}.{name}" for name in missing})
        for name, module in swapped.items():
            if any(quantizer is not None and not quantizer.calibrated for quantizer in module.quantizers):
                raise ModelError(f"the quantized model has no grid for layer {name}; it is damaged, save it again")
            module.to(devices[name.partition(".")[0]])
            module.phase = Phase.QUANTIZED
        _refuse_names("no tensors of the name", set(_state(roots)) - set(state))
    except BaseException:
        if undo is not None:
            undo()
        unswap(roots, chosen, swapped)
        raise


def _built(layer: Layer, config: Mapping[str, Any]) -> QModule:
    try:
        return QModule.from_config(dict(config), layer.module)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"the quantized model describes layer {layer.name} in a way that no grid takes ({error}); save it again"
        ) from error


def _fits(modules: Mapping[str, Any], layers: Mapping[str, Layer], name: str) -> bool:
    wanted = QModule.classes.get(modules[name]["type"])
    return wanted is not None and name in layers and issubclass(wanted, cast(type, layers[name].kind.quantized_type))


def _check_tensors(roots: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that have no place in the networks, or another type or shape than what is there."""
    for name, value in state.items():
        root, _, path = name.partition(".")
        owner, _, key = path.rpartition(".")
        try:
            known = _persistent(roots[root].get_submodule(owner))[key]
        except (KeyError, AttributeError):
            raise ModelError(
                f"the quantized model holds tensor {name}, which the network has not; it belongs to another model"
            ) from None
        if known is not None and (known.shape, known.dtype) != (value.shape, value.dtype):
            raise ModelError(
                f"the quantized model's tensor {name} is {value.dtype} of shape {tuple(value.shape)}, the network's "
                f"is {known.dtype} of shape {tuple(known.shape)}; it belongs to another model"
            )


def _persistent(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own parameters and saved buffers, those that are `None` still included."""
    hidden = module._non_persistent_buffers_set
    buffers = {name: value for name, value in module._buffers.items() if name not in hidden}
    return {**module._parameters, **buffers}


def _state(roots: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{root}.{name}": cast(Tensor, value)
        for root, network in roots.items()
        for name, value in network.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }


def _refuse_names(what: str, names: set[str]) -> None:
    if names:
        first = sorted(names)[0]
        raise ModelError(f"the quantized model has {what}: {first} ({len(names)} in all); it is damaged, save it again")
