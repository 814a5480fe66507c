"""Locks on folders and files. A lock ends with its process, so a folder or file that nobody has locked is unused.

Network file systems (NFS) lock files but not folders. There a file named `lock` in the folder is locked instead.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from personalized_soups.errors import OutputExistsError, UsageError

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_ROOM = FULL_DISK | {errno.EFBIG}

LOCK_FILE = "lock"


def lock_folder(folder: Path, target: Path) -> int | None:
    """Make `folder` if it is missing and lock it; return the descriptor that holds the lock.

    Return None if the system or the file system cannot lock folders.

    Args:
        folder: the folder.
        target: the output that is made in it, for errors.

    Raises:
        OutputExistsError: if another run holds the lock.
        UsageError: if the folder cannot be made or opened.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        with suppress(FileExistsError):
            _make(folder, target)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another run ended and removed it between the two calls
        except OSError as error:
            raise _unmakable(error, target) from error
        is_ours = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the lock is on the folder, not on its path: another run may have removed it before this one got the lock
            is_ours = _leads_to(folder, descriptor)
        except BlockingIOError as error:
            raise _busy(target) from error
        except OSError:  # the file system cannot lock folders
            remove_if_empty(folder)
            return None
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            return descriptor


def lock_file(path: Path, *, waits: bool) -> int | None:
    """Make a file if it is missing and lock it; return the descriptor that holds the lock, or None without locks.

    Raises:
        BlockingIOError: if another run holds the lock and `waits` is false.
        OSError: if the file cannot be made, for example because its folder was removed.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        is_ours = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            is_ours = _leads_to(path, descriptor)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            return None
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            return descriptor


@contextmanager
def folder_with_lock_file(name_folder: Callable[[], Path], target: Path, *, waits: bool) -> Iterator[Path]:
    """Make a folder if it is missing, lock the file `lock` in it, and yield the folder.

    Afterwards the folder is removed if it has no other files.

    Args:
        name_folder: returns the folder's path; called again if another run removes the folder before it is locked.
        target: the output that is made in it, for errors.
        waits: whether to wait for the lock if another run holds it.

    Raises:
        OutputExistsError: if another run holds the lock and `waits` is false.
        UsageError: if the folder or the file cannot be made.
        OSError: if the disk is full.
    """
    while True:
        folder = name_folder()
        with suppress(FileExistsError):
            _make(folder, target)
        try:
            descriptor = lock_file(folder / LOCK_FILE, waits=waits)
        except FileNotFoundError:
            continue  # another run removed the folder between the two calls
        except BlockingIOError as error:
            raise _busy(target) from error
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise _unmakable(error, target) from error
        break
    try:
        yield folder
    finally:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
        remove_if_empty(folder)
        if descriptor is not None:
            os.close(descriptor)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    with suppress(OSError):
        folder.rmdir()


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _make(folder: Path, target: Path) -> None:
    try:
        folder.mkdir()
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise _unmakable(error, target) from error


def _busy(target: Path) -> OutputExistsError:
    return OutputExistsError(
        "another run is writing this output",
        where=str(target),
        mend="wait until that run has ended, or choose another output folder",
    )


def _unmakable(error: OSError, target: Path) -> UsageError:
    return UsageError(
        f"the output folder cannot be made: {error.strerror}",
        where=str(target),
        mend="choose a shorter name, or a parent folder with write permission",
    )
