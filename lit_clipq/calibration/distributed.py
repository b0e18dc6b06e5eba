"""Exchanges between ranks that are the identity on one process."""

from typing import Any, TypeVar

from torch import distributed as dist

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
