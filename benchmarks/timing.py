"""Timing of several calls in turn."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def medians(calls: Sequence[Callable[[], object]], runs: int, warmup: int = 2, inference: bool = True) -> list[float]:
    """Return the median milliseconds of each call, all called in turn in each run, by default in inference mode."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode(inference):
        for run in range(warmup + runs):
            for call, kept in zip(calls, times, strict=True):
                started = time.perf_counter()
                call()
                if run >= warmup:
                    kept.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(kept) for kept in times]
