"""An endpoint of OpenAI's protocol on a real socket, which answers or fails as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias


@dataclass
class Response:
    """What the endpoint sends.

    With `missing` bytes, the body ends that much too early.
    """

    body: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    missing: int = 0


Behaviour: TypeAlias = Callable[[dict[str, Any], int], Response]
"""Returns the response to a request, given its JSON body and how many requests came before it."""


def completion(text: str | None, *, finish: str = "stop", model: str = "judge-2026-11-01") -> Response:
    """Return a chat completion of 7 input tokens and 3 output tokens."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": model, "system_fingerprint": "fp_1"}
    return Response(json.dumps(body | {"choices": [choice], "usage": usage}))


def error(status: int, message: str, **headers: str) -> Response:
    return Response(json.dumps({"error": {"message": message}}), status, headers)


@dataclass
class Endpoint:
    """A running endpoint, with every request that it received."""

    url: str
    requests: list[dict[str, Any]]
    keys: list[str | None]


@contextmanager
def endpoint(behaviour: Behaviour) -> Iterator[Endpoint]:
    """Yield a running endpoint."""
    lock = threading.Lock()
    received: list[dict[str, Any]] = []
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                before = len(received)
                received.append(body)
                keys.append(self.headers.get("authorization"))
            response = behaviour(body, before)
            content = response.body.encode()
            with suppress(ConnectionError):  # the client may have given up
                self.send_response(response.status)
                self.send_header("content-length", str(len(content) + response.missing))
                for name, value in {"content-type": "application/json", **response.headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)
            if response.missing:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", received, keys)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
