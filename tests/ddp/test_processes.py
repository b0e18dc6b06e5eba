"""The helper that starts processes must itself fail when a process does."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ddp.processes import run_processes


def sum_of_ranks(rank, offset):
    value = torch.tensor(rank + offset)
    dist.all_reduce(value)
    return rank, dist.get_world_size(), int(value), torch.get_num_threads()


def raise_on_last(rank):
    if rank == 1:
        raise ValueError("planted failure")


def die_on_last(rank):
    if rank == 1:
        os._exit(3)
    time.sleep(60)


def hang(rank):
    time.sleep(60)


def test_results_come_back_by_rank_from_one_group():
    assert run_processes(sum_of_ranks, 10) == [(0, 2, 21, 1), (1, 2, 21, 1)]


def test_exception_in_a_process_fails_with_its_traceback():
    with pytest.raises(AssertionError, match=r"rank 1 raised(.|\n)*planted failure"):
        run_processes(raise_on_last)


@pytest.mark.slow
def test_dead_process_fails():
    with pytest.raises(AssertionError, match="rank 1 died with exit code 3"):
        run_processes(die_on_last)


@pytest.mark.slow
def test_hanging_processes_fail_after_the_timeout():
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] did not return in time"):
        run_processes(hang, timeout=6)
