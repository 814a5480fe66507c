"""The list of the finished pieces of a long run, in a text file that only grows.

If the process is killed, at most the last line is lost.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

# The file with Linux's identifier of the current boot. After a power cut, pieces that the journal lists may be lost
# unless they were synced to the disk. So a journal is valid only until the next boot, unless it is durable.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The names of finished pieces, in the order in which they were added. A thread-safe context manager.

    The first line of the file holds the identity of the run and the identifier of the boot. An existing file is
    discarded if its first line differs. A durable journal has no boot identifier, so it stays valid after a reboot. An
    incomplete last line is dropped.

    Args:
        path: the journal's file, which need not exist.
        identity: the identity of the run. Two runs with the same identity write the same bytes.
        durable: whether every line is synced to the disk before `add` returns.

    Raises:
        OSError: if the file cannot be read or written.
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
        """Add the name of a finished piece.

        Raises:
            OSError: if the file cannot be written.
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
        # A full disk may leave half a line. With the next line appended it is not JSON, so it is never read as a name.
        while line:
            line = line[os.write(self._descriptor, line) :]
        if self._durable:
            os.fsync(self._descriptor)


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _name(line: bytes) -> str | None:
    """Return the name in a line, or None if the line is incomplete or invalid."""
    with suppress(ValueError):
        name = json.loads(line)
        if isinstance(name, str) and line == _line(name):
            return name
    return None


def _boot() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(8)  # unknown boot: match no other journal
