"""Transfers from a server on loopback that misbehaves on demand."""

import hashlib
import io
import multiprocessing
import os
import re
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from datamodules import download as module
from datamodules.coco import PRESETS, CocoRetrieval
from datamodules.download import Archive, download, fetch
from lit_clipq.errors import DataError


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `content`; each request is recorded as its Range header."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = zipped({f"val/{i}.jpg": os.urandom(20_000) for i in range(10)})
        self.etag: str | None = '"one"'
        self.cut_after: list[int] = []  # bytes to send before the connection is cut, request by request
        self.ranges = True
        self.lie = 0  # added to Content-Length
        self.status: int | None = None
        self.heeds_if_range = True
        self.requests: list[str | None] = []
        self.conditions: list[str | None] = []  # If-Range of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/x.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        state, wanted = self.server, self.headers.get("Range")
        state.requests.append(wanted)
        state.conditions.append(self.headers.get("If-Range"))
        if state.status:
            self.send_error(state.status)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and state.ranges else 0
        if state.heeds_if_range and self.headers.get("If-Range") not in (None, state.etag):
            start = 0
        if start and start >= len(state.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(state.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = state.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
        if state.etag:
            self.send_header("ETag", state.etag)
        self.send_header("Content-Length", str(len(body) + state.lie))
        self.end_headers()
        self.wfile.write(body[: state.cut_after.pop(0)] if state.cut_after else body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


def archive_of(server, known=True, **options):
    size = {"size_bytes": len(server.content), "sha256": hashlib.sha256(server.content).hexdigest()} if known else {}
    return Archive(server.url, **{"produces": {"val": 10}, **size, **options})


def leftovers(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


@pytest.mark.parametrize("known", [True, False])
def test_an_archive_is_fetched_once(server, tmp_path, known):
    archive = archive_of(server, known)
    fetch(archive, tmp_path / "data")
    fetch(archive, tmp_path / "data")
    assert leftovers(tmp_path / "data") == ["val"]
    assert len(os.listdir(tmp_path / "data/val")) == 10
    assert server.requests == [None]


@pytest.mark.parametrize("known", [True, False])
def test_a_cut_connection_is_resumed_where_it_broke_off(server, tmp_path, known):
    server.cut_after = [50_000, 1_000]
    download(archive_of(server, known), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == server.content
    assert server.requests == [None, "bytes=50000-", "bytes=51000-"]
    assert server.conditions == [None, '"one"', '"one"']
    assert os.listdir(tmp_path) == ["x.zip"]


def test_a_second_run_resumes_the_first(server, tmp_path):
    server.cut_after = [60_000] + [0] * 5
    with pytest.raises(DataError, match=r"broke off at 60,000 bytes, 5 times in a row.*resumes"):
        download(archive_of(server), tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()
    server.requests.clear()
    download(archive_of(server), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == server.content
    assert server.requests == ["bytes=60000-"]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path, heeds_if_range):
    server.heeds_if_range = heeds_if_range
    server.cut_after = [60_000] + [0] * 5
    with pytest.raises(DataError):
        download(archive_of(server, known=False), tmp_path / "x.zip")
    server.content, server.etag = zipped({"val/new": os.urandom(90_000)}), '"two"'
    download(archive_of(server, known=False), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == server.content


def test_without_validator_and_checksum_nothing_is_resumed(server, tmp_path):
    server.etag = None
    server.cut_after = [60_000]
    download(archive_of(server, known=False), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == server.content
    assert server.requests == [None, None]


def test_a_server_without_ranges_begins_anew(server, tmp_path):
    server.ranges = False
    server.cut_after = [60_000]
    download(archive_of(server), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == server.content


def test_a_complete_part_of_unknown_size_is_taken(server, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(server.content)
    (tmp_path / "x.zip.part.json").write_text('{"validator": "\\"one\\""}')
    download(archive_of(server, known=False), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == server.content
    assert server.requests == [f"bytes={len(server.content)}-"]


def test_a_server_that_promises_too_much_is_not_believed(server, tmp_path):
    server.lie = 5_000
    server.ranges = False
    with pytest.raises(DataError, match=r"broke off.*5,000 promised bytes did not come"):
        download(archive_of(server, known=False), tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_a_server_that_promises_too_little_is_found_out(server, tmp_path):
    server.lie = -5_000
    with pytest.raises(DataError, match=r"offers .* bytes, expected"):
        fetch(archive_of(server), tmp_path)
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch(archive_of(server, known=False), tmp_path)
    assert not (tmp_path / "val").exists()


def test_a_wrong_checksum_removes_the_download(server, tmp_path):
    with pytest.raises(DataError, match=r"has SHA-256 .*, not 0000"):
        fetch(archive_of(server, sha256="0" * 64), tmp_path)
    assert leftovers(tmp_path) == []


def test_a_malicious_archive_writes_nothing_outside(server, tmp_path):
    server.content = zipped({"val/a": b"1", "../evil": b"2"})
    with pytest.raises(DataError, match="would leave the folder"):
        fetch(archive_of(server), tmp_path / "data")
    assert os.listdir(tmp_path) == ["data"]
    assert leftovers(tmp_path / "data") == ["x.zip"]


def test_an_archive_that_lacks_what_it_should_produce_is_named(server, tmp_path):
    with pytest.raises(DataError, match=r"was unpacked.*'val': 11"):
        fetch(archive_of(server, produces={"val": 11}), tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_too_little_disk_is_said_before_the_transfer(server, tmp_path, monkeypatch, known):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6, 100_000))
    with pytest.raises(DataError, match="GB are free; make room"):
        fetch(archive_of(server, known), tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 5)])
def test_error_answers_are_named_and_only_passing_ones_retried(server, tmp_path, status, requests):
    server.status = status
    with pytest.raises(DataError, match=str(status)):
        fetch(archive_of(server), tmp_path)
    assert len(server.requests) == requests


def test_no_server_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match="start again later"):
        fetch(Archive("http://127.0.0.1:9/x.zip", {"val": 1}), tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x.zip"])
def test_other_schemes_are_refused(tmp_path, url):
    with pytest.raises(DataError, match="http or https"):
        fetch(Archive(url, {"val": 1}), tmp_path)


def test_a_data_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be stored"):
        fetch(archive_of(server), tmp_path / "file")


def test_two_processes_transfer_once(server, tmp_path):
    archive = archive_of(server)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(archive, tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(server.requests) == 1
    assert leftovers(tmp_path) == ["val"]


def test_a_data_module_fetches_what_it_lacks(server, coco, preprocessing, monkeypatch):
    root = coco(val=10)
    server.content = zipped({f"val2017/{path.name}": path.read_bytes() for path in (root / "val2017").iterdir()})
    for path in (root / "val2017").iterdir():
        path.unlink()
    annotations, _ = PRESETS["val2017"].archives
    there = Archive(annotations.url, {"annotations/captions_val2017.json": 1})
    preset = type(PRESETS["val2017"])(
        **{**vars(PRESETS["val2017"]), "archives": (there, archive_of(server, produces={"val2017": 10}))}
    )
    monkeypatch.setitem(PRESETS, "val2017", preset)
    data = CocoRetrieval(str(root), preset="val2017", download=True)
    data.preprocessing = preprocessing
    data.prepare_data()
    data.setup()
    assert data.sample_counts()["images"] == 9


@pytest.mark.parametrize(
    "archive",
    [value for value in vars(module).values() if isinstance(value, Archive)],
    ids=lambda archive: archive.name,
)
def test_official_archives_are_described_in_full(archive):
    assert archive.url.startswith(("http://images.cocodataset.org/", "https://"))
    assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256)
    assert archive.size_bytes > 10**6
    assert archive.produces
