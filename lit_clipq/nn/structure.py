"""What a quantized network has and the float one has not: a list of plain values, replayed when a model is loaded.

A stage that adds a module or a parameter puts an entry into the list; `replay` does the same to a network whose layers
were swapped, before its stored tensors go in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_clipq.errors import ModelError
from lit_clipq.nn.modules import QModule, QWeighted

Entry = Mapping[str, Any]
_REPLAYED: dict[str, Callable[[Mapping[str, QModule], Entry], None]] = {}


def replayed(kind: str) -> Callable[[Callable[[Mapping[str, QModule], Entry], None]], Any]:
    """Register what replays the entries of a kind."""

    def add(function: Callable[[Mapping[str, QModule], Entry], None]) -> Any:
        _REPLAYED[kind] = function
        return function

    return add


def replay(structure: Sequence[Entry], modules: Mapping[str, QModule]) -> None:
    """Do to swapped layers what the list says, in order.

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
def _bias(modules: Mapping[str, QModule], entry: Entry) -> None:
    module = modules.get(str(entry.get("layer")))
    if not isinstance(module, QWeighted):
        raise ModelError(f"the quantized model adds a bias to {entry.get('layer')}, which is no layer with a weight")
    if module.bias is None:
        add_bias(module, str(entry["layer"]))
