"""Linux system calls that Python does not offer.

Each function returns whether the call is supported. If it is not, the caller uses another way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

# Errors which mean that the kernel or the file system does not support a call, or not for the given files.
UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EPERM})

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FICLONE = 0x40049409


def allocate(descriptor: int, num_bytes: int) -> bool:
    """Set the size of a file and reserve its space on the disk. Return False if the system does not support this.

    os.posix_fallocate is not used, because glibc writes to every block if the file system does not support the call.

    Raises:
        OSError: if the disk has no room.
    """
    libc = _libc()
    if libc is None or num_bytes == 0:
        return False
    # repeat the call if a signal interrupts it
    while libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)) != 0:
        error = ctypes.get_errno()
        if error == errno.EINTR:
            continue
        return _refused(error)
    return True


def exchange(first: Path, second: Path) -> bool:
    """Exchange the files or folders at two paths atomically. Return False if the system does not support this.

    Raises:
        OSError: if a path does not exist or cannot be moved.
    """
    libc = _libc()
    if libc is None or not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(first), os.fsencode(second)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    return _refused(ctypes.get_errno())


def reflink(source: int, target: int) -> bool:
    """Let the empty file `target` share the disk blocks of `source` until one of the two files changes.

    Return False if the system does not support this.

    Raises:
        OSError: if the call fails for another reason.
    """
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
