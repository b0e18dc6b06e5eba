"""Feature caches on disk: what comes back, what a crash leaves, what is refused."""

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_clipq.errors import ConfigError, DataError
from lit_clipq.features import FeatureKey, FeatureStore, decode, items_hash
from lit_clipq.features.shard import is_whole
from lit_clipq.features.store import check_space
from tests.ddp.processes import run_processes

WIDTH = 8
LENGTHS = [3, 1, 4, 2, 5, 1, 3, 2, 4, 1, 2]
SHARD_BYTES = 3 * 5 * 2 * WIDTH  # three items of the longest
KEY = FeatureKey("model-a (tag)", "n" * 8, "float", "p" * 8, "texts", items_hash(range(11)), len(LENGTHS), "float16")


def features_of(item):
    return torch.randn(LENGTHS[item], WIDTH, generator=torch.Generator().manual_seed(item)) * 10.0 ** (item % 4 - 2)


def store(folder, **changes):
    return FeatureStore(folder, replace(KEY, **changes), LENGTHS, WIDTH, SHARD_BYTES)


def produce(seen=None):
    def compute(items):
        for item in items:
            if seen is not None:
                seen.append(item)
            yield features_of(item)

    return compute


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards_of(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_was_filled_is_read(tmp_path, dtype):
    filled = store(tmp_path, dtype=dtype)
    assert filled.fill(produce()) == len(LENGTHS)
    again = store(tmp_path, dtype=dtype)
    assert again.fill(produce()) == 0
    for item in (10, 0, 7, 4):
        values, scales = again.read(item)
        want = features_of(item)
        assert values.dtype == (torch.int8 if dtype == "int8" else torch.float16)
        if dtype == "float16":
            assert scales is None
            assert torch.equal(decode(values, scales), want.half().float())
        else:
            step = want.abs().amax(1, keepdim=True) / 127
            assert ((decode(values, scales) - want).abs() <= step / 2 + 1e-7).all()


def test_shards_are_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    store(tmp_path).fill(produce())
    path = shards_of(tmp_path)[0]
    content = load_file(path)
    assert content["starts"].tolist() == [0, *torch.tensor(LENGTHS[: len(content["starts"]) - 1]).cumsum(0).tolist()]
    assert torch.equal(content["values"][:3], features_of(0).half())


def test_features_beyond_half_precision_are_clipped_and_zeros_stay_zero(tmp_path):
    large = torch.full((2, WIDTH), 1e6)
    large[1] = 0.0
    for dtype in ("float16", "int8"):
        one = FeatureStore(tmp_path / dtype, replace(KEY, count=1, dtype=dtype), [2], WIDTH)
        one.fill(lambda _: iter([large]))
        values = decode(*one.read(0))
        assert values.isfinite().all()
        assert (values[1] == 0).all()


@pytest.mark.parametrize("damage", ["cut", "flipped", "no sum", "gone", "unreadable sum"])
def test_only_a_damaged_shard_is_computed_again(tmp_path, damage):
    store(tmp_path).fill(produce())
    path = shards_of(tmp_path)[1]
    whole, others = path.read_bytes(), {name: data for name, data in files(tmp_path).items() if "000001" not in name}
    if damage == "cut":
        path.write_bytes(whole[:-5])
    elif damage == "flipped":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "no sum":
        path.with_name(f"{path.name}.sum").unlink()
    elif damage == "gone":
        path.unlink()
    else:
        path.with_name(f"{path.name}.sum").write_text("{")
    assert not is_whole(path)
    seen = []
    assert store(tmp_path).fill(produce(seen)) == len(seen)
    assert seen == [3, 4, 5]
    assert path.read_bytes() == whole
    assert others.items() <= files(tmp_path).items()


CRASHING = """
import sys, time
from pathlib import Path
import tests.features.test_store as t
def compute(items):
    for item in items:
        if item == 7:
            print("half way", flush=True)
            time.sleep(60)
        yield t.features_of(item)
t.store(Path(sys.argv[1])).fill(compute)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_its_finished_shards(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CRASHING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "half way"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / f".000003.safetensors.{process.pid}").write_bytes(b"left over")
    seen = []
    store(tmp_path).fill(produce(seen))
    assert seen == [6, 7, 8, 9, 10]  # the shards of 0-2 and 3-5 were finished
    assert not list(tmp_path.glob(".*"))
    assert torch.equal(decode(*store(tmp_path).read(7)), features_of(7).half().float())


def test_what_a_running_process_is_writing_is_left_alone(tmp_path):
    alive = tmp_path / f".000002.safetensors.{os.getppid()}"
    alive.write_bytes(b"half")
    store(tmp_path).fill(produce())
    assert alive.read_bytes() == b"half"


FULL_DISK = """
import resource, sys
from pathlib import Path
import tests.features.test_store as t
from lit_clipq.errors import DataError
from lit_clipq.features import store
old = store.write_shard
def once_full(path, items, dtype):
    if path.name.startswith("000002"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    old(path, items, dtype)
store.write_shard = once_full
try:
    t.store(Path(sys.argv[1])).fill(t.produce())
except DataError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_fills_is_told_and_finished_shards_stay(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "is full after 2 of 4 missing shards, which stay" in run.stdout
    assert "--model.cache.folder" in run.stdout
    assert [path.name for path in shards_of(tmp_path)] == ["000000.safetensors", "000001.safetensors"]
    assert not list(tmp_path.glob(".*"))
    assert store(tmp_path).fill(produce()) == 5


def test_too_little_space_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 100, 100))
    seen = []
    with pytest.raises(DataError, match=r"needs 0\.00 GB more, the disk has 0\.00 GB free; .*int8"):
        store(tmp_path).fill(produce(seen))
    assert not seen


def test_the_space_for_several_caches_is_checked_together(tmp_path, monkeypatch):
    stores = [store(tmp_path / name) for name in "abc"]
    needed = stores[0].predicted_bytes(range(stores[0].shards))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 0, 2 * needed))
    for one in stores:
        check_space([one])
    with pytest.raises(DataError, match="and others beside it need"):
        check_space(stores)
    stores[1].fill(produce())  # what is there needs no space
    check_space(stores)


def test_progress_tells_the_share_that_is_done(tmp_path):
    shares = []
    store(tmp_path).fill(produce(), progress=shares.append)
    assert len(shares) == len(LENGTHS)
    assert shares == sorted(set(shares))
    assert shares[2] == 1 / 4  # a shard of three items, of four
    assert shares[-1] == 1
    store(tmp_path).fill(produce(), progress=shares.append)
    assert len(shares) == len(LENGTHS)  # nothing to do


def test_the_prediction_bounds_what_is_written(tmp_path):
    for dtype in ("float16", "int8"):
        filled = store(tmp_path / dtype, dtype=dtype)
        predicted = filled.predicted_bytes(range(filled.shards))
        filled.fill(produce())
        written = sum(path.stat().st_size for path in shards_of(tmp_path / dtype))
        assert 0.1 * predicted < written <= predicted  # small shards are mostly header


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "model-b (tag)"}, r"made by model model-a \(tag\), but this run has model-b \(tag\)"),
        ({"variant": "vanilla, vision W8A8, text W8A8", "network": "m"}, "as 'float', but this run has it as 'vanilla"),
        ({"network": "m"}, "other weights, codes or scales"),
        ({"preprocessing": "q"}, "another preprocessing"),
        ({"items": "other"}, "holds 11 texts, not the 11 texts of this run"),
        ({"dtype": "int8"}, "stores float16, but this run wants int8"),
    ],
)
def test_the_cache_of_another_run_is_refused(tmp_path, changes, told):
    store(tmp_path).fill(produce())
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=told) as raised:
        store(tmp_path, **changes)
    assert str(tmp_path) in str(raised.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", ["{", "{}", json.dumps({"key": {"model": 1}})])
def test_a_folder_that_is_no_cache_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="cannot be used"):
        store(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "told"), [(lambda x: x * float("nan"), "NaN or Inf"), (lambda x: x[:, :3], "expected features")]
)
def test_wrong_features_are_never_kept(tmp_path, wrong, told):
    with pytest.raises(DataError, match=told):
        store(tmp_path).fill(lambda items: (wrong(features_of(item)) for item in items))
    assert not shards_of(tmp_path)


def fill_together(rank, folder, group=0, **changes):
    seen = []
    filled = store(folder, **changes)
    try:
        filled.fill(produce(seen), group=group)
    except DataError as error:
        return str(error)
    return seen, [decode(*filled.read(item)) for item in range(len(filled))]


def fill_and_fail(rank, folder):
    if rank == 0:
        return fill_together(rank, folder)
    with pytest.raises(ZeroDivisionError):
        store(folder).fill(lambda items: (1 / 0 for _ in items))
    return "own error"


def in_all_ways(rank, folder):
    results = {
        "shared": fill_together(rank, folder / "shared"),
        "after a crash": fill_together(rank, folder / "damaged"),
        "apart": fill_together(rank, folder / str(rank), group=rank),
        "one fails": fill_and_fail(rank, folder / "failed"),
        "different": fill_together(rank, folder / f"different{rank}", network=str(rank)),
    }
    return results


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes get out of each way to fill a cache."""
    folder = tmp_path_factory.mktemp("together")
    store(folder / "damaged").fill(produce())
    for shard in (0, 2):  # both of the first process by number
        shards_of(folder / "damaged")[shard].write_bytes(b"")
    results = run_processes(in_all_ways, folder)
    return folder, {name: [result[name] for result in results] for name in results[0]}


def test_processes_share_the_work_and_all_read_all_of_it(together, tmp_path):
    folder, results = together
    assert sorted(item for seen, _ in results["shared"] for item in seen) == list(range(len(LENGTHS)))
    assert all(len(seen) > 2 for seen, _ in results["shared"])
    store(tmp_path).fill(produce())
    assert files(folder / "shared") == files(tmp_path)
    for _, read in results["shared"]:
        assert all(torch.equal(read[item], features_of(item).half().float()) for item in range(len(LENGTHS)))


def test_what_a_crash_left_is_divided_anew(together):
    assert [seen for seen, _ in together[1]["after a crash"]] == [[0, 1, 2], [6, 7, 8]]


def test_machines_without_a_common_disk_make_their_own(together):
    assert [len(seen) for seen, _ in together[1]["apart"]] == [len(LENGTHS)] * 2


def test_the_failure_of_one_process_reaches_the_others(together):
    other, own = together[1]["one fails"]
    assert own == "own error"
    assert "process 1 could not fill the feature cache" in other
    assert "ZeroDivisionError" in other


def test_processes_with_different_networks_are_told_apart(together):
    assert all("see different texts or networks" in told for told in together[1]["different"])


def test_reading_keeps_no_file_open_or_mapped(tmp_path):
    filled = store(tmp_path)
    filled.fill(produce())
    for item in range(len(LENGTHS)):
        filled.read(item)
    opened = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and path.exists()}
    assert not [name for name in opened if name.startswith(str(tmp_path))]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
