"""Clients of a server that cost as little as can be: what they measure is the server, on the same two cores."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


class HungUp(Exception):  # noqa: N818 # no fault: it was asked for
    """The client hung up, as it was to."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A streamed answer.

    Args:
        model: what it says that it is from.
        text: all of it.
        num_tokens: by the server's own count.
        first: seconds until the first token.
        whole: seconds until the end.
    """

    model: str
    text: str
    num_tokens: int
    first: float
    whole: float


class Client:
    """One connection, kept open, that asks one thing after another."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Self:
        await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, body: Mapping[str, Any], *, hang_up_after: int | None = None) -> Heard:
        """Stream one chat completion.

        Args:
            body: of the request, less the streaming.
            hang_up_after: leave after so many parts.

        Raises:
            HungUp: if it left; the connection is a new one then.
        """
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        began = time.perf_counter()
        await self._send("POST", "/v1/chat/completions", data)
        status, headers = await self._head()
        if status != 200:
            raise RuntimeError(f"{status}: {(await self._plain_body(headers)).decode()}")
        first = 0.0
        parts: list[bytes] = []
        while part := await self._chunk():
            first = first or time.perf_counter() - began
            parts.append(part)
            if hang_up_after is not None and len(parts) >= hang_up_after:
                self._writer.transport.abort()
                await self._connect()
                raise HungUp
        whole = time.perf_counter() - began
        return _heard(b"".join(parts), first, whole)

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send any other request, and return the status and what it says."""
        data = b"" if body is None else json.dumps(body).encode()
        await self._send(method, path, data, **headers)
        status, all_headers = await self._head()
        content = await self._plain_body(all_headers)
        return status, json.loads(content) if content else None

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)

    async def _send(self, method: str, path: str, data: bytes, **headers: str) -> None:
        all_headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(data))}
        all_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        await self._writer.drain()

    async def _head(self) -> tuple[int, dict[str, str]]:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        return int(lines[0].split()[1]), headers

    async def _chunk(self) -> bytes:
        size = int(await self._reader.readline(), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    async def _plain_body(self, headers: Mapping[str, str]) -> bytes:
        return await self._reader.readexactly(int(headers.get("content-length", "0")))


def _heard(stream: bytes, first: float, whole: float) -> Heard:
    text, model, count = [], "", 0
    for event in stream.split(b"\n\n"):
        if not event.startswith(b"data: {"):
            continue
        chunk = json.loads(event[6:])
        if "error" in chunk:
            raise RuntimeError(chunk["error"]["message"])
        model = chunk["model"]
        text += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
        if chunk.get("usage"):
            count = chunk["usage"]["completion_tokens"]
    return Heard(model, "".join(text), count, first, whole)
