"""results.jsonl: locked, repaired, whole."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lit_clipq.analysis.records import read_records
from lit_clipq.errors import ConfigError, DataError
from lit_clipq.sweep import ResultsFile
from tests.analysis.test_records import point

ROOT = Path(__file__).resolve().parents[2]


def opened(path: Path, **options) -> ResultsFile:
    return ResultsFile(path, point("a").identity, **options)


def test_lines_are_there_once_appended(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    with opened(path) as file:
        for name in "ab":
            file.append(point(name))
            assert [record.id for record in read_records(path)] == list("ab"[: "ab".index(name) + 1])
        assert file.has("b")
        assert not file.has("c")


@pytest.mark.parametrize("cut", [1, 5, 9, 10, 40, -1])
def test_a_line_that_was_cut_short_is_taken_off(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    lines = [f"{point(name).to_line()}\n".encode() for name in "ab"]
    path.write_bytes(lines[0] + lines[1][:cut])
    with opened(path) as file:
        assert file.has("a")
        assert not file.has("b")
        file.append(point("b"))
    assert path.read_bytes() == b"".join(lines)


def test_a_file_whose_only_line_was_cut_short_is_empty_again(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(point("a").to_line().encode())
    with opened(path) as file:
        assert not file.has("a")
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "error"), [("my notes", ConfigError), ("my notes\n", DataError), ("{}\n", DataError)]
)
def test_a_file_of_something_else_stays_as_it_is(tmp_path, content, error):
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(error), opened(path):
        pass
    assert path.read_text() == content


def test_two_sweeps_do_not_write_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    script = (
        "import sys; from pathlib import Path; from tests.sweep.test_file import opened\n"
        "with opened(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", script, str(path)], **pipes) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(ConfigError, match=r"another sweep is writing .*results\.jsonl; wait"), opened(path):
            pass
        other.kill()  # a lock that is left by a process that was killed holds nobody up
        other.wait()
        with opened(path) as file:
            file.append(point("a"))


def test_points_of_another_model_are_refused_unless_asked_for(tmp_path):
    path = tmp_path / "results.jsonl"
    other = replace(point("a").identity, model="x", data="y")
    with opened(path) as file:
        file.append(point("a"))
    with pytest.raises(ConfigError, match="holds points of other model and other data; give another --results"):
        ResultsFile(path, other).__enter__()
    with ResultsFile(path, other, mix=True) as file:
        file.append(point("b", identity=other))
    assert len(read_records(path)) == 2


@pytest.mark.parametrize("written", [0, 50, None])
def test_a_full_disk_costs_no_line_that_is_there(tmp_path, monkeypatch, written):
    path = tmp_path / "results.jsonl"
    with opened(path) as file:
        file.append(point("a"))
        before = path.read_bytes()
        if written is None:
            monkeypatch.setattr(os, "fsync", full)
        else:
            real, left = os.write, [written]
            monkeypatch.setattr(os, "write", lambda *args: limited(real, left, *args))
        with pytest.raises(ConfigError, match="No space left on device; the 1 points before it are kept") as caught:
            file.append(point("b"))
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
        assert path.read_bytes() == before
        file.append(point("b"))
    assert [record.id for record in read_records(path)] == ["a", "b"]


def full(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limited(real, left: list[int], handle: int, line: bytes) -> int:
    """Write what fits, once; then the disk is full."""
    taken = left[0]
    left[0] = 0
    return real(handle, line[:taken]) if taken else full()


def test_lines_are_put_in_the_order_of_the_sweep(tmp_path):
    path = tmp_path / "results.jsonl"
    failed = replace(point("b"), error="no memory")
    with opened(path) as file:
        for record in (failed, point("c"), point("other"), point("a"), point("b")):
            file.append(record)
        assert len(path.read_text().splitlines()) == 5
        file.put_in_order({"a": 0, "b": 1, "c": 2})
    assert [record.id for record in read_records(path)] == ["other", "a", "b", "c"]
    assert len(path.read_text().splitlines()) == 4


def test_a_folder_in_its_place_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="results cannot be written"), opened(tmp_path):
        pass


@pytest.mark.parametrize(
    "content", ['{"format": 1, "id": "a"}', '{"format":"an export","x":1}', '{"format":2,"id":"a"}', "key: value"]
)
def test_a_file_of_something_else_without_a_line_end_is_left_as_it_was(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is no results file of a sweep"), opened(path):
        pass
    assert path.read_text() == content


def test_a_line_is_taken_for_torn_wherever_it_was_cut(tmp_path):
    path = tmp_path / "results.jsonl"
    line = point("a").to_line()
    for length in (1, 5, 12, 18, 40, len(line)):
        path.write_text(line[:length])
        with opened(path) as file:
            assert not file.has("a")
        assert path.read_text() == ""
