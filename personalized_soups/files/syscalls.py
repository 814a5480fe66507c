"""Calls of the Linux kernel that Python lacks; each says whether it was done, so that its caller can fall back."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

# What kernels and file systems answer where they lack a call, or lack it for these two files.
UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EPERM})

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FICLONE = 0x40049409


def allocate(descriptor: int, num_bytes: int) -> bool:
    """Give a file its size and its room on the disk; return whether that was done.

    Not os.posix_fallocate: where the file system cannot, glibc writes into every block instead.

    Raises:
        OSError: if the disk has no room.
    """
    libc = _libc()
    if libc is None or num_bytes == 0:
        return False
    # an interrupted call may be made again
    while libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)) != 0:
        error = ctypes.get_errno()
        if error == errno.EINTR:
            continue
        return _refused(error)
    return True


def exchange(one: Path, other: Path) -> bool:
    """Swap what two paths lead to, in one step; return whether that was done.

    Raises:
        OSError: if one of them is not there or may not be moved.
    """
    libc = _libc()
    if libc is None or not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    return _refused(ctypes.get_errno())


def reflink(source: int, target: int) -> bool:
    """Let an empty file share the blocks of another until one of them is changed; return whether that was done."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        return _refused(error.errno or 0)
    return True


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _refused(error: int) -> bool:
    if error in UNSUPPORTED:
        return False
    raise OSError(error, os.strerror(error))
