"""Descriptors of SQLite files, one a file and process, that nobody closes while SQLite has the file open.

A process loses all its POSIX locks on a file when it closes any descriptor of it (https://www.sqlite.org/howtocorrupt.html,
section 2.2), SQLite's among them. So whoever reads the bytes of a database reads them here.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

# Device and inode; an inode is not used for another file as long as a descriptor of it is open.
Identity = tuple[int, int]

_BLOCK = 4 << 20

_lock = threading.Lock()
_descriptors: dict[Identity, int] = {}
_holders: dict[Identity, int] = {}
_strays: list[int] = []


def identity_of(path: Path) -> Identity | None:
    """Return which file a path names now; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino)


def hold(path: Path) -> Identity | None:
    """Keep a descriptor of the file that a path names until `release`; None where there is none, or another by now."""
    with _lock:
        identity = identity_of(path)
        if identity is None:
            return None
        if identity not in _descriptors:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                return None
            found = os.fstat(descriptor)
            if (found.st_dev, found.st_ino) != identity:
                _strays.append(descriptor)  # it may be of a file that SQLite has open: it stays open, too
                return None
            _descriptors[identity] = descriptor
        _holders[identity] = _holders.get(identity, 0) + 1
        return identity


def release(identity: Identity) -> None:
    """Let go of a file; its descriptor is closed with its last holder, who has closed SQLite's connections before."""
    with _lock:
        _holders[identity] -= 1
        if not _holders[identity]:
            del _holders[identity]
            os.close(_descriptors.pop(identity))


def count_bytes(identity: Identity, sought: bytes) -> int:
    """Return how often `sought` stands in a file that is held."""
    descriptor, place, count, kept = _descriptors[identity], 0, 0, b""
    while block := os.pread(descriptor, _BLOCK, place):
        place += len(block)
        block = kept + block
        count += block.count(sought)
        kept = block[len(block) - len(sought) + 1 :] if len(sought) > 1 else b""
    return count
