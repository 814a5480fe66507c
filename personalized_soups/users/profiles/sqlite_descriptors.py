"""File descriptors for reading the bytes of SQLite files. A process has one for each file while SQLite uses the file.

If a process closes any descriptor of a file, it loses all its POSIX locks on that file, including those of SQLite
(https://www.sqlite.org/howtocorrupt.html, section 2.2). So code must not open a database file itself to read its bytes;
it must use this module.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

# The device and the inode of a file. The system does not reuse an inode while a descriptor of the file is open.
Identity = tuple[int, int]

_BLOCK = 4 << 20

_lock = threading.Lock()
_descriptors: dict[Identity, int] = {}
_holders: dict[Identity, int] = {}
_strays: list[int] = []


def identity_of(path: Path) -> Identity | None:
    """Return the identity of the file at a path, or None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino)


def hold(path: Path) -> Identity | None:
    """Keep a descriptor of the file at a path open until `release`, and return the identity of the file.

    Return None if the file cannot be opened, or if another process replaced the file at the same time.
    """
    with _lock:
        identity = identity_of(path)
        if identity is None:
            return None
        if identity not in _descriptors:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                return None
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != identity:
                _strays.append(descriptor)  # SQLite may have this file open, so the descriptor must stay open
                return None
            _descriptors[identity] = descriptor
        _holders[identity] = _holders.get(identity, 0) + 1
        return identity


def release(identity: Identity) -> None:
    """Undo one call of `hold`. The last call closes the descriptor, so close SQLite's connections before."""
    with _lock:
        _holders[identity] -= 1
        if not _holders[identity]:
            del _holders[identity]
            os.close(_descriptors.pop(identity))


def count_bytes(identity: Identity, pattern: bytes) -> int:
    """Return how often `pattern` occurs in a file that `hold` keeps open."""
    descriptor, place, count, kept = _descriptors[identity], 0, 0, b""
    while block := os.pread(descriptor, _BLOCK, place):
        place += len(block)
        block = kept + block
        count += block.count(pattern)
        kept = block[len(block) - len(pattern) + 1 :] if len(pattern) > 1 else b""
    return count
