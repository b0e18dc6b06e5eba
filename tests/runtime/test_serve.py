"""The web page: what it answers, and what it does not hand out."""

import json
import shutil
import socket
import threading
from http.client import HTTPConnection

import pytest
from PIL import Image

from lit_clipq.console import main
from lit_clipq.errors import ConfigError
from lit_clipq.mini.world import picture, picture_captions
from lit_clipq.runtime import Index, load
from lit_clipq.runtime.folder import CONTENT_FILE, content_hash
from lit_clipq.runtime.serve import make_server
from tests.export.conftest import Exported, twin  # noqa: F401 - a fixture


@pytest.fixture
def address(twin: Exported, tmp_path):  # noqa: F811
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(picture("validation", i)).save(folder / f"{i}.png")
    (tmp_path / "secret.png").write_bytes((folder / "0.png").read_bytes())
    model = load(twin.report.path)
    server = make_server(model, Index.build(model, folder), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address
    server.shutdown()
    thread.join()
    server.server_close()


def get(address, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = HTTPConnection(*address)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_page_searches_and_shows_pictures(address):
    status, page = get(address, "/")
    assert status == 200
    assert b"4 pictures, mini-vit" in page
    status, found = get(address, "/search?text=" + picture_captions("validation", 2)[0].replace(" ", "+"))
    answer = json.loads(found)
    assert sorted(hit["name"] for hit in answer["hits"]) == [f"{i}.png" for i in range(4)]
    assert answer["hits"] == sorted(answer["hits"], key=lambda hit: -hit["score"])
    assert answer["milliseconds"] > 0
    status, jpeg = get(address, f"/picture/{answer['hits'][0]['number']}")
    assert status == 200
    assert jpeg[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    "path",
    [
        "/picture/../secret.png",
        "/picture/%2e%2e/secret.png",
        "/picture/4",
        "/picture/-1",
        "/secret.png",
        "/picture/²",
        "/picture/" + 5000 * "1",
    ],
)
def test_nothing_but_indexed_pictures_is_handed_out(address, path):
    with socket.create_connection(address) as raw:  # as sent, without a client that tidies the path
        raw.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        assert raw.makefile("rb").readline().split()[1] == b"404"


def test_an_address_that_is_none_is_refused(address):
    with socket.create_connection(address) as raw:
        raw.sendall(b"GET http://[ HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert raw.makefile("rb").readline().split()[1] == b"400"


def test_a_text_without_end_is_cut(address):
    status, found = get(address, "/search?text=" + 10_000 * "cat+")
    assert status == 200
    assert len(json.loads(found)["hits"]) == 4


def test_an_export_without_tokenizer_is_told_before_pictures_are_embedded(twin: Exported, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "export"
    shutil.copytree(twin.report.path, folder)
    content = json.loads((folder / CONTENT_FILE).read_text())
    del content["checksum"]
    content["tokenizer"] = {"reason": "a tokenizer of another kind", "context_length": 77}
    (folder / CONTENT_FILE).write_text(json.dumps({**content, "checksum": content_hash(content)}))
    assert main(["serve", str(folder), "--pictures", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: this export has no tokenizer (a tokenizer of another kind)\n"


def test_a_page_elsewhere_cannot_ask_by_a_name_of_its_own(address):
    assert get(address, "/", host="elsewhere.example")[0] == 403


def test_a_port_in_use_is_told(twin: Exported, address):  # noqa: F811
    with pytest.raises(ConfigError, match="cannot be used"):
        make_server(load(twin.report.path), None, address[1])


def test_serving_what_is_no_export_is_one_sentence(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "--pictures", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: expected an export in")
    assert main(["serve", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: lit-clipq serve: the following arguments are required: --pictures\n"
