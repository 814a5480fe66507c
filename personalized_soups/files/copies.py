"""Copy bytes between files in the fastest way that the file systems support."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from personalized_soups.files.regular import opened
from personalized_soups.files.syscalls import UNSUPPORTED, reflink

CopyMode = Literal["copy", "reflink", "link"]

# The maximum number of bytes per system call. It is small enough that Ctrl-C is handled soon.
_PIECE = 32 << 20
_BUFFER = 4 << 20


def copy_file(source: Path, target: Path, how: CopyMode = "copy") -> CopyMode:
    """Create the file `target` with the bytes of `source`, and return the mode that was used.

    `reflink` lets both files share their blocks on the disk until one of the files changes. `link` gives the source a
    second name (a hard link), so a change in place changes both files. If the file system does not support the
    requested mode, the bytes are copied. The permissions of a copy follow the umask; a link has the permissions of
    `source`. Symbolic links are followed.

    Raises:
        InputError: if `source` is not a regular file or cannot be opened.
        OSError: if copying fails, or if `target` exists.
    """
    with opened(source) as reading:
        if how == "link" and _linked(source, target):
            return "link"
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if how == "reflink" and reflink(reading, writing):
                return "reflink"
            length = os.fstat(reading).st_size
            if length == 0 or not copy_range(reading, 0, writing, 0, length):  # files in /proc have size 0
                _copy_through_memory(reading, writing)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(writing)
    return "copy"


def copy_range(source: int, start: int, target: int, begin: int, length: int) -> bool:
    """Let the kernel copy `length` bytes from offset `start` of `source` to offset `begin` of `target`.

    Return whether all bytes were copied. The result is False if the kernel does not support the copy or if `source` is
    too short. In that case some of the bytes may have been copied.

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
            return False  # the file was truncated in the meantime
        done += moved
    return True


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:
        return False  # other device, file system without links, or file of another user: copy instead
    return True


def _copy_through_memory(reading: int, writing: int) -> None:
    place = 0
    while data := os.pread(reading, _BUFFER, place):
        write_at(writing, memoryview(data), place)
        place += len(data)


def write_at(descriptor: int, data: memoryview, place: int) -> None:
    """Write all of `data` to an open file, starting at the offset `place`.

    Raises:
        OSError: if writing fails.
    """
    done = 0
    while done < len(data):  # one write may be partial: a signal interrupts it, and Linux writes at most 2 GiB
        done += os.pwrite(descriptor, data[done : done + _PIECE], place + done)
