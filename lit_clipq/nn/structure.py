"""What a quantized network has and the float one has not: a list of plain values, replayed when a model is loaded.

A stage that adds a module or a parameter puts an entry into the list; `replay` does the same to a network whose layers
were swapped, before its stored tensors go in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.errors import ModelError
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.nn.rotation import RotatedNorm

Entry = Mapping[str, Any]
Undo = Callable[[], None]


@dataclass(frozen=True)
class Swapped:
    """Networks whose layers were swapped."""

    modules: Mapping[str, QModule]
    """The Q-modules by name."""
    roots: Mapping[str, nn.Module]
    """The networks by name."""

    def owner(self, name: str) -> tuple[nn.Module, str]:
        """Return the parent and the key of a module by its dotted path, the root's name first.

        Raises:
            ModelError: If there is no such module.
        """
        root, _, path = name.partition(".")
        parent, _, key = path.rpartition(".")
        try:
            owner = self.roots[root].get_submodule(parent)
        except (KeyError, AttributeError):
            owner = None
        if owner is None or owner._modules.get(key) is None:
            raise ModelError(f"the quantized model changes module {name}, which the network has not")
        return owner, key


Replay = Callable[[Swapped, Entry], Undo | None]
_REPLAYED: dict[str, Replay] = {}


def replayed(kind: str) -> Callable[[Replay], Replay]:
    """Register what replays the entries of a kind, and returns what takes back a change outside of Q-modules."""

    def add(function: Replay) -> Replay:
        _REPLAYED[kind] = function
        return function

    return add


def replay(
    structure: Sequence[Entry], modules: Mapping[str, QModule], roots: Mapping[str, nn.Module] | None = None
) -> Undo:
    """Do to swapped networks what the list says, in order.

    Args:
        structure: The list.
        modules: The Q-modules by name.
        roots: The networks by name, where entries speak of more than Q-modules.

    Returns:
        What takes back what was changed outside of the Q-modules.

    Raises:
        ModelError: For an entry of an unknown kind, or one that does not fit; nothing outside of Q-modules is changed.
    """
    undo: list[Undo] = []

    def back() -> None:
        for function in reversed(undo):
            function()

    try:
        for entry in structure:
            function = _REPLAYED.get(str(entry.get("kind"))) if isinstance(entry, Mapping) else None
            if function is None:
                raise ModelError(
                    f"the quantized model has a structure entry {entry!r} that this version does not know; expected "
                    f"one of {', '.join(sorted(_REPLAYED))}; use the version that wrote it"
                )
            taken = function(Swapped(modules, roots or {}), entry)
            undo += [] if taken is None else [taken]
    except BaseException:
        back()
        raise
    return back


def add_bias(module: QWeighted, name: str) -> Entry:
    """Give a layer without a bias one of zeros, and return the entry that says so."""
    weight = module.weight
    zeros = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
    return {"kind": "bias", "layer": name}


@replayed("bias")
def _bias(network: Swapped, entry: Entry) -> None:
    module = network.modules.get(str(entry.get("layer")))
    if not isinstance(module, QWeighted):
        raise ModelError(f"the quantized model adds a bias to {entry.get('layer')}, which is no layer with a weight")
    if module.bias is None:
        add_bias(module, str(entry["layer"]))


def float_bias(name: str) -> Entry:
    """Return the entry of a bias that a layer got which may have stayed float."""
    return {"kind": "float_bias", "layer": name}


@replayed("float_bias")
def _float_bias(network: Swapped, entry: Entry) -> Undo | None:
    name = str(entry.get("layer"))
    if name in network.modules:
        _bias(network, entry)
        return None
    owner, key = network.owner(name)
    layer: Any = owner._modules[key]
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ModelError(f"the quantized model adds a bias to {name}, which is no layer with a weight")
    if layer.bias is not None:
        return None
    layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=layer.weight.requires_grad)
    return partial(setattr, layer, "bias", None)


def rotated_norm(name: str, width: int, *, behind: bool) -> Entry:
    """Return the entry of a `RotatedNorm` in the place of a normalisation."""
    return {"kind": "rotated_norm", "module": name, "width": width, "behind": behind}


@replayed("rotated_norm")
def _rotated_norm(network: Swapped, entry: Entry) -> Undo:
    width, behind = entry.get("width"), entry.get("behind")
    if not isinstance(width, int) or not 0 < width < 2**16 or not isinstance(behind, bool):
        raise ModelError(f"the quantized model has a damaged structure entry {dict(entry)!r}; save it again")
    owner, key = network.owner(str(entry.get("module")))
    norm = owner._modules[key]
    assert norm is not None  # noqa: S101 - `owner` says so
    owner._modules[key] = RotatedNorm.empty(norm, width, behind=behind)
    return partial(owner._modules.__setitem__, key, norm)


COMPENSATION = "compensation"
"""Name of the linear layer of a block that `compensate` gave one."""
_HANDLE = "_compensation_handle"


def compensate(block: nn.Module, linear: nn.Linear) -> None:
    """Let a block return its output plus `linear` of its first input, both (*, d), until `uncompensate`."""
    block.add_module(COMPENSATION, linear)
    setattr(block, _HANDLE, block.register_forward_hook(_with_compensation))


def uncompensate(block: nn.Module) -> None:
    """Undo `compensate`."""
    getattr(block, _HANDLE).remove()
    delattr(block, _HANDLE)
    delattr(block, COMPENSATION)


def _with_compensation(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + block.get_submodule(COMPENSATION)(inputs[0])  # type: ignore[no-any-return]


@replayed(COMPENSATION)
def _compensation(network: Swapped, entry: Entry) -> Undo:
    owner, key = network.owner(str(entry.get("block")))
    block, width = owner._modules[key], entry.get("width")
    if block is None or type(width) is not int or not 0 < width < 2**16 or hasattr(block, COMPENSATION):
        raise ModelError(f"the quantized model has a damaged structure entry {dict(entry)!r}; save it again")
    like = next(block.parameters(), torch.zeros(()))
    compensate(block, nn.Linear(width, width, device=like.device))
    return partial(uncompensate, block)
