"""A real server on a real socket, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from openai import OpenAI

from personalized_soups import SoupModel
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.serving.web.app import Server
from personalized_soups.serving.web.server import UvicornServer, listen, load_model
from personalized_soups.serving.web.settings import Settings
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.profiles.store import ProfileStore


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


@dataclass
class RunningServer:
    port: int
    server: Server
    model: SoupModel
    store: ProfileStore | None
    clients: list[OpenAI] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> OpenAI:
        """Return a client, which is closed with the server."""
        made = OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})
        self.clients.append(made)
        return made

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *, host: str = ""
    ) -> Reply:
        """Send one request, its path as it is, and its body as JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=250)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.putrequest(method, path, skip_host=bool(host))
            if host:
                connection.putheader("Host", host)
            for name, value in {**sent, **(headers or {})}.items():
                connection.putheader(name, value)
            if data is not None:
                connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data)
            found = connection.getresponse()
            return Reply(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        finally:
            connection.close()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return once the condition holds; the suite's timeout ends a test in which it never does."""
        while not holds():
            time.sleep(0.01)

    def is_idle(self) -> bool:
        load = self.server.batcher.load
        return load.waiting == 0 and load.running == 0


@contextmanager
def running(
    base: Path,
    experts: Path,
    settings: Settings,
    *,
    profiles: str | Path | None = None,
    catalogue: Catalogue | None = None,
    pool: QuestionPool | None = None,
    on: Path | None = None,
    dtype: Any = "float32",
) -> Iterator[RunningServer]:
    """Serve until the block ends."""
    model, files = load_model(
        str(base), lambda: ExpertLibrary.open(experts), on=on, device="cpu", dtype=dtype, same_base=False
    )

    def check(profile: Any) -> None:
        model.resolve(profile)

    store = None if profiles is None else ProfileStore.open(profiles, check=check)
    listening = listen("127.0.0.1", 0, has_key=False)
    made: list[Server] = []
    started = threading.Event()
    ended: list[uvicorn.Server] = []

    async def serve() -> None:
        server = Server(model, settings, files=files, store=store, catalogue=catalogue, pool=pool)
        made.append(server)
        ended.append(UvicornServer(server))
        started.set()
        try:
            await ended[0].serve(sockets=[listening])
        finally:
            server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not started.wait(0.05):
        assert thread.is_alive(), "the server ended before it started"
    served = RunningServer(listening.getsockname()[1], made[0], model, store)
    try:
        served.wait_until(lambda: ended[0].started)
        yield served
    finally:
        for client in served.clients:
            client.close()
        ended[0].should_exit = True
        thread.join()
        if store is not None:
            store.close()


def send_raw(port: int, path: str, body: Any) -> socket.socket:
    """Send a request and return its socket, nothing read."""
    data = json.dumps(body).encode()
    sent = socket.create_connection(("127.0.0.1", port), timeout=250)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    sent.sendall(head.encode() + b"\r\n\r\n" + data)
    return sent
