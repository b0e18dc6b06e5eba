"""Independent jobs on a GPU that waits for Python: several at a time, each with a stream of its own."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_THREADS = 2


def in_turn(jobs: Sequence[Callable[[], T]], device: torch.device, *, together: bool) -> Iterator[T]:
    """Run jobs and yield their results in order.

    On a CUDA device, kernels of one job are too small to keep it busy while Python prepares the next; PyTorch lets go
    of the interpreter while it launches them.

    Args:
        jobs: Independent of each other; they may use what the current stream computed.
        device: Where they compute.
        together: Whether several may run at a time, which takes the workspace of each; else, and on a CPU, one does.
    """
    if device.type != "cuda" or not together:
        for job in jobs:
            yield job()
        return
    torch.linalg.inv(torch.ones(1, 1, device=device))  # the first use loads a library, which two threads must not do
    torch.cuda.synchronize(device)
    with ThreadPoolExecutor(_THREADS, initializer=_own_stream, initargs=(device,)) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
    torch.cuda.synchronize(device)


def _own_stream(device: torch.device) -> None:
    """Give the calling thread a stream of its own."""
    torch.cuda.set_stream(torch.cuda.Stream(device))
