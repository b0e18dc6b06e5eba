"""Points on GPUs and machines, by Ray: it places workers and says when one is lost; the file stays here."""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from lit_clipq.analysis.records import PointRecord
from lit_clipq.errors import ConfigError, LitClipqError
from lit_clipq.sweep.options import SweepOptions
from lit_clipq.sweep.runner import Point

log = logging.getLogger(__name__)

Worker = Callable[[list[str], list[str], str | None, str], Iterator[str]]
"""Measures points: command line, ids, line of the float network if it is known, and folder; to lines, one by one."""
CORES = 2
"""CPU cores of a worker where there are no GPUs."""


@dataclass
class Unit:
    """Points that one worker measures, as they share work."""

    points: dict[str, Point]
    """Those that are missing, by id; without any the worker measures the float network alone."""
    losses: int = field(default=0)
    """How many workers were lost over it."""


def units_of(points: Sequence[Point], workers: int) -> list[Unit]:
    """Cut a grid so that there is work for all workers and as little as possible is done twice.

    Points that are calibrated together stay together, unless there are fewer such groups than workers.
    """
    groups = [list(members) for _, members in groupby(points, key=lambda point: point.group)]
    parts = -(-workers // max(1, len(groups)))
    cut = [
        group[number * len(group) // parts : (number + 1) * len(group) // parts]
        for group in groups
        for number in range(parts)
    ]
    return [Unit({point.id: point for point in part}) for part in cut if part]


class RayEngine:
    """Measures points on a Ray cluster.

    Args:
        options: Of the sweep.
        worker: What a worker does.
        args: The command line, which a worker reads again.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, options: SweepOptions, worker: Worker, args: Sequence[str]) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "--sweep.engine ray needs Ray, which is not installed; run `pip install 'lit-clipq[sweep]'`"
            ) from error
        self.ray, self.options, self.worker, self.args = ray, options, worker, list(args)

    def run(
        self,
        points: Sequence[Point],
        baseline: PointRecord | None,
        keep: Callable[[PointRecord], None],
        fail: Callable[[Point, Exception], None],
    ) -> None:
        """Measure the float network, unless that is done, and all points.

        Args:
            points: Those of one group follow each other.
            baseline: The record of the float network, where it is measured.
            keep: Takes a record as soon as it is there.
            fail: Told a point whose workers were lost too often.
        """
        started = self._join()
        try:
            if baseline is None:
                found: list[PointRecord] = []
                self._work([Unit({})], None, found.append, fail, workers=1)
                if not found:
                    raise ConfigError("the float network cannot be measured: its Ray workers were lost; see Ray's log")
                baseline = found[0]
                keep(baseline)
            workers = self._workers()
            self._work(units_of(points, workers), baseline, keep, fail, workers)
        finally:
            if started:
                self.ray.shutdown()

    def _join(self) -> bool:
        """Connect to the cluster; returns whether this started or joined it."""
        if self.ray.is_initialized():
            return False
        try:
            self._knock()
            self.ray.init(address=self.options.address, log_to_driver=False, include_dashboard=False)
        except (OSError, ValueError, RuntimeError) as error:
            told = " ".join(str(error).split())
            raise ConfigError(
                f"there is no Ray cluster at {self.options.address} ({told}); correct --sweep.address"
            ) from error
        return True

    def _knock(self) -> None:
        """Try whether anything listens at the address of a cluster: Ray itself would try for minutes.

        Raises:
            OSError: If nothing does.
        """
        host, _, port = (self.options.address or "").rpartition(":")
        if host and "/" not in host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()

    def _workers(self) -> int:
        there = self.ray.cluster_resources()
        return self.options.workers or max(1, int(there.get("GPU", 0) or there.get("CPU", 1) // CORES))

    def _remote(self, workers: int) -> Any:
        there = self.ray.cluster_resources()
        gpus = int(there.get("GPU", 0) > 0)
        cores = 1 if gpus else max(1, int(there.get("CPU", 1) // workers))
        # Lost workers are tried again here: only here it is known which of their points have come back.
        return self.ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=0)(self.worker).options(
            num_returns="streaming"
        )

    def _work(
        self,
        units: Sequence[Unit],
        baseline: PointRecord | None,
        keep: Callable[[PointRecord], None],
        fail: Callable[[Point, Exception], None],
        workers: int,
    ) -> None:
        remote = self._remote(workers)
        line = None if baseline is None else baseline.to_line()
        waiting = deque(units)
        running: dict[Any, Unit] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                unit = waiting.popleft()
                running[remote.remote(self.args, list(unit.points), line, os.getcwd())] = unit
            ready, _ = self.ray.wait(list(running), num_returns=1)
            stream: Any = ready[0]
            unit = running[stream]
            try:
                record = PointRecord.from_line(str(self.ray.get(next(stream))))
            except StopIteration:
                del running[stream]
                continue
            except self.ray.exceptions.RayTaskError as error:
                raise _own(error) from error
            except self.ray.exceptions.RayError as error:
                del running[stream]
                self._lost(unit, error, waiting, fail)
                continue
            unit.points.pop(record.id, None)
            keep(record)

    def _lost(
        self, unit: Unit, error: Exception, waiting: deque[Unit], fail: Callable[[Point, Exception], None]
    ) -> None:
        unit.losses += 1
        kind = type(error).__name__
        if unit.losses <= self.options.retries:
            log.warning("a Ray worker was lost (%s); its %d missing points are tried again", kind, len(unit.points))
            waiting.append(unit)
            return
        for point in list(unit.points.values()):
            fail(point, ConfigError(f"its Ray workers were lost {unit.losses} times ({kind}); see Ray's log"))


def _own(error: Any) -> LitClipqError:
    """Return the error of a worker as one of this program's own."""
    cause = error.cause
    told = " ".join(str(cause).split())
    return type(cause)(told) if isinstance(cause, LitClipqError) else ConfigError(f"a Ray worker failed: {told}")
