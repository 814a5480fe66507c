"""Copying bytes from file to file by the shortest way that the file systems offer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from personalized_soups.files.regular import opened
from personalized_soups.files.syscalls import UNSUPPORTED, reflink

CopyMode = Literal["copy", "reflink", "link"]

# Bytes that one call moves: few enough for Ctrl-C to be heard soon.
_PIECE = 32 << 20
_BUFFER = 4 << 20


def copy_file(source: Path, target: Path, how: CopyMode = "copy") -> CopyMode:
    """Make a new file `target` of the bytes of `source`; return how: where a way is closed, a plain copy is made.

    `reflink` shares the blocks on the disk until one of the two is changed. `link` gives the one file a second name:
    who changes it in place changes both. Modes follow the umask, but for a link, which has its source's. Symbolic links
    are followed.

    Raises:
        InputError: if the source is no regular file or cannot be opened.
        OSError: if copying fails, or `target` is there.
    """
    with opened(source) as reading:
        if how == "link" and _linked(source, target):
            return "link"
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if how == "reflink" and reflink(reading, writing):
                return "reflink"
            length = os.fstat(reading).st_size
            if length == 0 or not copy_range(reading, 0, writing, 0, length):  # files of /proc have no size
                _copy_through_memory(reading, writing)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(writing)
    return "copy"


def copy_range(source: int, start: int, target: int, begin: int, length: int) -> bool:
    """Let the kernel copy `length` bytes from `start` in one open file to `begin` in another; return whether it did.

    Where it returns False nothing or a part was copied: the kernel cannot, or the source is shorter than that.

    Raises:
        OSError: if reading or writing fails.
    """
    if sys.platform != "linux":
        return False
    done = 0
    while done < length:
        try:
            moved = os.copy_file_range(source, target, min(_PIECE, length - done), start + done, begin + done)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return False
            raise
        if moved == 0:
            return False  # the file is shorter than it was
        done += moved
    return True


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:
        return False  # across devices, on file systems without links, on files of others: copied instead
    return True


def _copy_through_memory(reading: int, writing: int) -> None:
    place = 0
    while data := os.pread(reading, _BUFFER, place):
        write_at(writing, memoryview(data), place)
        place += len(data)


def write_at(descriptor: int, data: memoryview, place: int) -> None:
    """Write all of `data` at a place of an open file.

    Raises:
        OSError: if writing fails.
    """
    done = 0
    while done < len(data):  # a write may be cut short, by a signal or at 2 GiB
        done += os.pwrite(descriptor, data[done : done + _PIECE], place + done)
