"""A Hugging Face hub for tests: a server on this machine, whose requests are counted."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

MODEL = "owner/model"


class Hub:
    """A hub on this machine that has the files of one folder as `owner/model`.

    Attributes:
        way: how the hub answers: it `serves`, `closes` each connection, `hangs`, or `refuses`.
        refusal: the status, and the hub's error code, with which it refuses.
        requests: method and path of each request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._way = "serves"
        self.refusal = (503, "")
        self.requests: list[str] = []
        self.is_over = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, has_body=False)

            def do_GET(self) -> None:
                hub.answer(self, has_body=True)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def way(self) -> str:
        return self._way

    @way.setter
    def way(self, way: str) -> None:
        self._way = way
        constants.HF_HUB_ETAG_TIMEOUT = _timeout(way)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def asked_for_model(self) -> list[str]:
        return [request for request in self.requests if "/resolve/" in request or "/api/models/" in request]

    def answer(self, handler: BaseHTTPRequestHandler, *, has_body: bool) -> None:
        self.requests.append(f"{handler.command} {handler.path}")
        if self.way == "closes":
            handler.close_connection = True
            return
        if self.way == "hangs":
            self.is_over.wait()
            handler.close_connection = True
            return
        file = self.folder / handler.path.rpartition("/")[2]
        status, code = (200, "") if self.way == "serves" else self.refusal
        if status == 200 and not (handler.path.startswith(f"/{MODEL}/resolve/") and file.is_file()):
            status, code = 404, "EntryNotFound"
        content = file.read_bytes() if status == 200 else b""
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("X-Repo-Commit", "0" * 40)
        if status == 200:
            handler.send_header("ETag", f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"')
        else:
            handler.send_header("X-Error-Code", code)
        handler.end_headers()
        if has_body:
            handler.wfile.write(content)

    def close(self) -> None:
        self.is_over.set()
        self.server.shutdown()
        self.server.server_close()


def _timeout(way: str) -> Any:
    """Return the seconds that huggingface_hub waits: few where no answer comes, many on a busy machine that answers."""
    return 0.2 if way == "hangs" else 60


@contextmanager
def used_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yield a hub that huggingface_hub asks within the block, with an empty cache."""
    hub = Hub(folder)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    # Both objects keep the endpoint that was set when they were made: it may be the address of an earlier test's hub.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", _timeout(hub.way))
    try:
        yield hub
    finally:
        hub.close()
