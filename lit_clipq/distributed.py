"""Exchanges between ranks that are the identity on one process."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lit_clipq.errors import CalibrationError

T = TypeVar("T")


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(value: T) -> list[T]:
    """Return the values of all ranks in order of rank; `[value]` without a process group.

    Meant for small things on the CPU (ranges, profiles): they travel pickled between the processes of one run.
    """
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add a tensor up over all ranks, in place; it must be on the device of the process group's backend."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def check_same_on_all_ranks(roots: Mapping[str, nn.Module]) -> None:
    """Compare the networks of all ranks by a checksum of each tensor; does nothing on one process.

    Raises:
        CalibrationError: On every rank, if one holds another network than the first; names a tensor that differs.
    """
    if world_size() == 1:
        return
    own = {f"{root}.{name}": _checksum(x) for root, net in roots.items() for name, x in net.state_dict().items()}
    everyone = gather({name: (kind, check.tolist()) for name, (kind, check) in own.items()})
    for other, theirs in enumerate(everyone):
        differing = [name for name in {**everyone[0], **theirs} if everyone[0].get(name) != theirs.get(name)]
        if differing:
            raise CalibrationError(
                f"rank {other} holds another network than rank 0: {differing[0]} differs ({len(differing)} tensors in "
                "all); load the same weights on every rank"
            )


def _checksum(x: Tensor) -> tuple[str, Tensor]:
    """Return (shape and type, three sums over the bits of a tensor that depend on their order)."""
    whole = x.detach().contiguous().reshape(-1)
    bits = whole.view(torch.int32 if whole.element_size() % 4 == 0 else torch.uint8)
    parts = [bits[i::3].sum(dtype=torch.int64) for i in range(3)]
    return f"{tuple(x.shape)} {x.dtype}", torch.stack(parts)
