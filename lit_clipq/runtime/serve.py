"""A web page on this machine: type a text, see the pictures that fit it, and how long it took."""

import html
import json
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lit_clipq.errors import ConfigError, DataError
from lit_clipq.pictures import load_rgb
from lit_clipq.runtime.index import Index
from lit_clipq.runtime.model import IntegerCLIP, load

HOST = "127.0.0.1"
_MOST, _THUMBNAIL, _LONGEST_TEXT, _DIGITS = 24, 320, 1000, 18
_PATIENCE = 30
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Picture search</title>
<style>
body { font: 16px sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }
input { font: inherit; width: 70%; padding: .4em; } button { font: inherit; padding: .4em 1em; }
#hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(11em, 1fr)); gap: 1em; margin-top: 1em; }
figure { margin: 0; } img { width: 100%; border-radius: .4em; } figcaption { color: #555; font-size: .8em; }
</style></head><body>
<h1>Picture search</h1>
<form><input id="text" autofocus maxlength="1000" aria-label="Text"> <button>Search</button></form>
<p id="told">__COUNT__ pictures, __MODEL__</p><div id="hits"></div>
<script>
const told = document.getElementById("told"), hits = document.getElementById("hits");
document.querySelector("form").addEventListener("submit", async event => {
  event.preventDefault();
  const text = document.getElementById("text").value;
  const answer = await (await fetch("/search?text=" + encodeURIComponent(text))).json();
  hits.replaceChildren();
  if (answer.error) { told.textContent = answer.error; return; }
  told.textContent = `${answer.milliseconds.toFixed(1)} ms for ${answer.count} pictures`;
  for (const hit of answer.hits) {
    const figure = document.createElement("figure"), image = document.createElement("img");
    const caption = document.createElement("figcaption");
    image.src = "/picture/" + hit.number; image.alt = hit.name;
    caption.textContent = `${hit.score.toFixed(3)} ${hit.name}`;
    figure.append(image, caption); hits.append(figure);
  }
});
const asked = new URLSearchParams(location.search).get("text");  // a search can be linked to: /?text=
if (asked) { document.getElementById("text").value = asked; document.querySelector("form").requestSubmit(); }
</script></body></html>"""


def serve(
    folder: Path | str,
    pictures: Path | str,
    *,
    port: int = 8000,
    threads: int | None = None,
    ready: Callable[[ThreadingHTTPServer], None] | None = None,
) -> None:
    """Embed a folder of pictures, then answer on localhost until interrupted.

    Args:
        folder: An export.
        pictures: Folder of pictures.
        port: 0 takes a free one.
        threads: Of one product.
        ready: Told the server once it listens; by default its address is printed.

    Raises:
        ConfigError: If the port cannot be used, or the export has no tokenizer.
        DataError: If there are no pictures.
        ModelError: If the folder is no export.
    """
    model = load(folder, threads=threads)
    model.tokenize([""])  # not only once a first text is asked for
    index = Index.build(model, pictures)
    for reason in index.unread:
        print(f"left out: {reason}", flush=True)  # noqa: T201
    server = make_server(model, index, port)
    if ready is None:
        print(f"{len(index.names)} pictures on http://{HOST}:{server.server_port}", flush=True)  # noqa: T201
    else:
        ready(server)
    with server:
        server.serve_forever()


def make_server(model: IntegerCLIP, index: Index, port: int) -> ThreadingHTTPServer:
    """Return a server that listens on localhost alone.

    Raises:
        ConfigError: If the port cannot be used.
    """

    class Bound(_Handler):
        searched, by = index, model

    try:
        return ThreadingHTTPServer((HOST, port), Bound)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port {port} of {HOST} cannot be used: {error}; give another --port, or 0") from error


class _Handler(BaseHTTPRequestHandler):
    """Answers `/`, `/search?text=` and `/picture/NUMBER`; pictures go by number, so no path ever comes from outside."""

    searched: Index
    by: IntegerCLIP
    timeout = _PATIENCE
    """Seconds that a connection may be silent in the middle of a request."""

    def do_GET(self) -> None:
        """Answer one request."""
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            self._refuse(HTTPStatus.FORBIDDEN)  # a name of another page that leads here
            return
        try:
            address = urlsplit(self.path)
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        if address.path == "/":
            self._answer("text/html; charset=utf-8", self._page().encode())
        elif address.path == "/search":
            self._answer("application/json", json.dumps(self._search(address.query)).encode())
        elif address.path.startswith("/picture/"):
            self._picture(address.path.removeprefix("/picture/"))
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _page(self) -> str:
        name = html.escape(str(self.by.content["model"]["name"]))
        return _PAGE.replace("__COUNT__", f"{len(self.searched.names):,}").replace("__MODEL__", name)

    def _search(self, query: str) -> dict[str, Any]:
        text = parse_qs(query, keep_blank_values=True).get("text", [""])[0][:_LONGEST_TEXT]
        start = time.perf_counter()
        hits = self.searched.search(self.by, text, count=_MOST)
        milliseconds = 1000 * (time.perf_counter() - start)
        number = {name: i for i, name in enumerate(self.searched.names)}
        found = []
        for hit in hits:
            name = hit.path.relative_to(self.searched.root).as_posix()
            found.append({"number": number[name], "name": name, "score": hit.score})
        return {"milliseconds": milliseconds, "count": len(self.searched.names), "hits": found}

    def _picture(self, number: str) -> None:
        known = number.isascii() and number.isdigit() and len(number) <= _DIGITS  # longer ones Python will not read
        if not (known and int(number) < len(self.searched.names)):
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        path = self.searched.root / self.searched.names[int(number)]
        try:
            if not path.resolve().is_relative_to(self.searched.root):
                raise DataError(f"{path} leads out of {self.searched.root}")
            picture = load_rgb(path)
        except DataError:
            self._refuse(HTTPStatus.NOT_FOUND)  # it changed since it was embedded
            return
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        content = BytesIO()
        picture.save(content, "JPEG", quality=90)
        self._answer("image/jpeg", content.getvalue())

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_error(status)

    def _answer(self, kind: str, content: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)


__all__ = ["make_server", "serve"]
