"""A sweep on a local Ray cluster."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from lit_clipq.cli import main
from lit_clipq.errors import ConfigError
from lit_clipq.recipes import make_recipe
from lit_clipq.sweep import SweepOptions
from lit_clipq.sweep.ray_engine import RayEngine, units_of
from lit_clipq.sweep.runner import Point
from tests.sweep.test_sweep import FEW, VANILLA, refused

GRID = [*VANILLA, "--sweep.vision_bits", "[32,8,4]", "--sweep.text_bits", "[32,6,3]", "--sweep.seeds", "[0,1]"]


def points(groups: int, each: int) -> list[Point]:
    recipe = make_recipe("vanilla")
    return [
        Point(f"{group}-{number}", "vanilla", group, recipe, lambda: recipe, lambda *_: [])
        for group in range(groups)
        for number in range(each)
    ]


@pytest.mark.parametrize(("groups", "workers", "units"), [(1, 1, 1), (1, 4, 4), (3, 2, 3), (3, 4, 6), (1, 100, 25)])
def test_units_are_the_grid_and_enough_for_all_workers(groups, workers, units):
    grid = points(groups, 25)
    cut = units_of(grid, workers)
    assert len(cut) == units
    assert [point for unit in cut for point in unit.points.values()] == grid
    assert all(len({point.group for point in unit.points.values()}) == 1 for unit in cut)


def test_without_ray_it_is_named_with_the_line_that_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    told = refused(capsys, tmp_path / "results.jsonl", *VANILLA, "--sweep.engine", "ray")
    assert "pip install 'lit-clipq[sweep]'" in told
    with pytest.raises(ConfigError, match="which is not installed"):
        RayEngine(SweepOptions(), lambda *_: iter(()), [])


def workers_below(pid: int) -> list[int]:
    """Processes that Ray gave a task of ours, among the descendants of a process."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(folder.name)] = command

    def descends(process: int) -> bool:
        while process in parents:
            if process == pid:
                return True
            process = parents[process]
        return False

    return [process for process in names if b"ray::measure_points" in names[process] and descends(process)]


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing_and_the_file_is_that_of_the_local_engine(tmp_path, cluster):
    local, spread = tmp_path / "local.jsonl", tmp_path / "ray.jsonl"
    sweep = ["sweep", "--config", "mini/retrieval", *FEW, *GRID]
    assert main([*sweep, "--results", str(local)]) == 0
    killed = []

    def kill_one() -> None:
        """Kill a worker as soon as two points are in the file, in the middle of its unit."""
        give_up = time.monotonic() + 300
        while not killed and time.monotonic() < give_up:
            time.sleep(0.02)
            if spread.is_file() and spread.read_bytes().count(b"\n") >= 2:
                for process in workers_below(os.getpid())[:1]:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)

    killer = threading.Thread(target=kill_one)
    killer.start()
    code = main([*sweep, "--sweep.engine", "ray", "--sweep.workers", "2", "--results", str(spread)])
    killer.join()
    assert code == 0
    assert len(killed) == 1
    assert spread.read_bytes() == local.read_bytes()


@pytest.mark.slow
def test_points_whose_workers_are_lost_again_and_again_fail_and_errors_of_workers_are_told(cluster):
    def dies(args, ids, baseline, folder):
        os.kill(os.getpid(), signal.SIGKILL)
        yield ""

    def refuses(args, ids, baseline, folder):
        yield from ()
        raise ConfigError("no such model")

    failed = []
    engine = RayEngine(SweepOptions(retries=1), dies, [])
    engine._work(units_of(points(1, 2), 1), None, pytest.fail, lambda *told: failed.append(told), 1)
    assert [point.id for point, _ in failed] == ["0-0", "0-1"]
    assert "its Ray workers were lost 2 times (WorkerCrashedError)" in str(failed[0][1])
    with pytest.raises(ConfigError, match=r"^no such model$"):
        RayEngine(SweepOptions(), refuses, [])._work(units_of(points(1, 1), 1), None, pytest.fail, pytest.fail, 1)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_a_cluster_that_is_not_there_is_named(tmp_path, capsys, address):
    pytest.importorskip("ray")
    options = [*VANILLA, "--sweep.engine", "ray", "--sweep.address", address]
    assert f"no Ray cluster at {address}" in refused(capsys, tmp_path / "results.jsonl", *options)
