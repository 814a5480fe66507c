"""uvicorn's HTTP protocol, extended to close the connections of clients that stop sending or reading."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Limits for the head of a request, which consists of the request line and the headers.
HEAD_SECONDS = 15.0
MAX_HEAD_BYTES = 64 << 10

# The connection of a client that reads nothing for this long is closed.
WRITE_SECONDS = 60.0

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with three limits that uvicorn itself lacks.

    The head of a request must arrive within HEAD_SECONDS and have at most MAX_HEAD_BYTES bytes. A client that does not
    read its response may block the connection for at most WRITE_SECONDS.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._is_in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the head of the first request."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all timers."""
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process data, and close the connection if the head of a request has too many bytes."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        # `on_headers_complete` resets the count, so bytes after the head do not count.
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        """Start the timer for the head of the next request."""
        super().on_message_begin()
        self._is_in_head = True
        if self._head_timer is None:
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        """Cancel the timer for the head, which is now complete."""
        self._is_in_head = False
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Start the timer for a client that does not read its response."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the timer, because the client reads its response again."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _close(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _cancel(self) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = None
