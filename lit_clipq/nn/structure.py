"""What a quantized network has and the float one has not: a list of plain values, replayed when a model is loaded.

A stage that adds a module or a parameter puts an entry into the list; `replay` does the same to a network whose layers
were swapped, before its stored tensors go in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.errors import ModelError
from lit_clipq.nn.modules import QWeighted

Entry = Mapping[str, Any]
_REPLAYED: dict[str, Callable[[Mapping[str, nn.Module], Entry], None]] = {}


def replayed(kind: str) -> Callable[[Callable[[Mapping[str, nn.Module], Entry], None]], Any]:
    """Register what replays the entries of a kind."""

    def add(function: Callable[[Mapping[str, nn.Module], Entry], None]) -> Any:
        _REPLAYED[kind] = function
        return function

    return add


def replay(structure: Sequence[Entry], modules: Mapping[str, nn.Module]) -> None:
    """Do to a network whose layers were swapped what the list says, in order.

    Args:
        structure: The list.
        modules: Every module of the networks by its name, the root's name first.

    Raises:
        ModelError: For an entry of an unknown kind, or one that does not fit the layers.
    """
    for entry in structure:
        function = _REPLAYED.get(str(entry.get("kind"))) if isinstance(entry, Mapping) else None
        if function is None:
            raise ModelError(
                f"the quantized model has a structure entry {entry!r} that this version does not know; expected one of "
                f"{', '.join(sorted(_REPLAYED))}; use the version that wrote it"
            )
        function(modules, entry)


def add_bias(module: QWeighted, name: str) -> Entry:
    """Give a layer without a bias one of zeros, and return the entry that says so."""
    weight = module.weight
    zeros = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
    return {"kind": "bias", "layer": name}


@replayed("bias")
def _bias(modules: Mapping[str, nn.Module], entry: Entry) -> None:
    module = modules.get(str(entry.get("layer")))
    if not isinstance(module, QWeighted):
        raise ModelError(f"the quantized model adds a bias to {entry.get('layer')}, which is no layer with a weight")
    if module.bias is None:
        add_bias(module, str(entry["layer"]))


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
def _compensation(modules: Mapping[str, nn.Module], entry: Entry) -> None:
    block, width = modules.get(str(entry.get("block"))), entry.get("width")
    if block is None or type(width) is not int or width < 1 or hasattr(block, COMPENSATION):
        raise ModelError(
            f"the quantized model compensates {entry.get('block')} of width {width!r}, which is no block here"
        )
    like = next(block.parameters(), torch.zeros(()))
    compensate(block, nn.Linear(width, width, device=like.device))
