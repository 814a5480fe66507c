"""What of a long work is finished: a text file that only grows, one line a piece, made so that a kill costs a line."""

from __future__ import annotations

import json
import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

# The kernel's name of the time since the machine was started. What was written before a power cut may be lost although
# the journal tells of it, unless it was synced.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The names of finished pieces, in the order in which they were added. A context manager; safe between threads.

    The first line says whose journal it is. A last line that was cut short is dropped. A journal of another identity,
    or from before the machine was started anew, is begun anew, but for one whose writer was `durable`.

    Args:
        path: the file; it need not be there.
        identity: what the work is: two works of one identity write the same bytes.
        durable: every line is on the disk before `add` returns.

    Raises:
        OSError: if it cannot be read or written.
    """

    def __init__(self, path: Path, identity: str, *, durable: bool = False) -> None:
        first = {"identity": identity, "boot": "any" if durable else _boot()}
        self._first = _line(first)
        self._durable = durable
        self._lock = threading.Lock()
        self._path = path
        self.names: list[str] = []
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def add(self, name: str) -> None:
        """Add the name of a piece that is finished.

        Raises:
            OSError: if it cannot be written.
        """
        with self._lock:
            self._append(_line(name))
            self.names.append(name)

    def _read(self) -> None:
        first, *lines = self._path.read_bytes().splitlines(keepends=True) or [b""]
        if first != self._first:
            os.ftruncate(self._descriptor, 0)
            self._append(self._first)
            return
        sound = len(first)
        for line in lines:
            name = _name(line)
            if name is None:
                break
            self.names.append(name)
            sound += len(line)
        os.ftruncate(self._descriptor, sound)

    def _append(self, line: bytes) -> None:
        while line:  # a line that was cut short by a full disk is no JSON with what comes after it
            line = line[os.write(self._descriptor, line) :]
        if self._durable:
            os.fsync(self._descriptor)


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _name(line: bytes) -> str | None:
    """Return what a whole line names; None for one that was cut short or is no line of a journal's."""
    with suppress(ValueError):
        name = json.loads(line)
        if isinstance(name, str) and line == _line(name):
            return name
    return None


def _boot() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(8)  # nobody can say that it is still the same: nothing is taken on trust
