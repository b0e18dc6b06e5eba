"""Run a function in several gloo processes and collect what each returned.

It fails, never skips: where processes cannot start, die, raise or hang, the test that needed them fails and says why.
"""

import os
import pickle
import queue
import socket
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(function, *args, world_size=2, timeout=120.0):
    """Call `function(rank, *args)` in `world_size` processes of one gloo group and return their results by rank.

    Args:
        function: importable by name (a top-level function of a test module).
        args: picklable.
        world_size: number of processes.
        timeout: seconds until all must have returned.

    Raises:
        AssertionError: A process raised (its traceback is the message), died without a word, or took too long.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_work, args=(rank, world_size, port, timeout, results, function, args), daemon=True)
        for rank in range(world_size)
    ]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # read when the child imports torch
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        for worker in workers:
            worker.start()
        return _collect(workers, results, time.monotonic() + timeout)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            if worker.pid is not None:
                worker.join()


def _collect(workers, results, deadline):
    done = {}
    while len(done) < len(workers):
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            dead = [i for i, w in enumerate(workers) if i not in done and not w.is_alive() and w.exitcode != 0]
            assert not dead, f"rank {dead[0]} died with exit code {workers[dead[0]].exitcode}"
            missing = [rank for rank in range(len(workers)) if rank not in done]
            assert time.monotonic() < deadline, f"ranks {missing} did not return in time"
            continue
        assert error is None, f"rank {rank} raised:\n{error}"
        done[rank] = pickle.loads(value)  # noqa: S301 our own bytes
    return [done[rank] for rank in range(len(workers))]


def _work(rank, world_size, port, timeout, results, function, args):
    # The variables are those of torchrun, so that a Lightning Trainer in `function` joins this group as well.
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        TORCHELASTIC_RUN_ID="tests",
    )
    try:
        torch.set_num_threads(1)
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=limit)
        value = function(rank, *args)
        dist.barrier()
        results.put((rank, pickle.dumps(value), None))  # bytes: a shared tensor would die with its process
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
