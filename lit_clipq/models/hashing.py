"""One short text that stands for the state of a network."""

import hashlib

import torch
from torch import nn

from lit_clipq.contracts import Stateful


def state_hash(module: Stateful) -> str:
    """Hash names, shapes, types and bytes of a module's state."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def network_hash(module: nn.Module) -> str:
    """Hash what a network computes: its state, and the classes and options of its modules (widths of codes and such).

    Two networks with the same hash give the same output; a quantized network has another than its float original.
    """
    return hashlib.blake2b(f"{module!r} {state_hash(module)}".encode(), digest_size=16).hexdigest()
