"""Locks on folders and files. A lock ends with its process, so no running process uses an unlocked folder or file.

Network file systems (NFS) can lock files but not folders. On them, a file named `lock` in the folder is locked instead.
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
    """Lock `folder`, and return the file descriptor that holds the lock. A missing folder is created.

    Return None if the operating system or the file system cannot lock folders.

    Args:
        folder: the folder.
        target: the output that is made in `folder`. Error messages name it.

    Raises:
        OutputExistsError: if another run holds the lock.
        UsageError: if the folder cannot be created or opened.
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
            continue  # another run ended and removed the folder between the two calls
        except OSError as error:
            raise _unmakable(error, target) from error
        is_ours = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock is on the folder, not on its path: another run may have removed the folder before it was locked.
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
    """Lock a file, and return the file descriptor that holds the lock. A missing file is created.

    Return None if the operating system or the file system has no locks. With `waits`, wait until the lock is free.

    Raises:
        BlockingIOError: if another run holds the lock and `waits` is false.
        OSError: if the file cannot be created, for example because its folder was removed.
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
    """Yield a folder in which the file named `lock` is locked during the block. A missing folder is created.

    After the block, the folder is removed if it has no files except `lock`.

    Args:
        name_folder: returns the path of the folder. It is called again if another run removes the folder before the
            file `lock` is locked.
        target: the output that is made in the folder. Error messages name it.
        waits: whether to wait for the lock if another run holds it.

    Raises:
        OutputExistsError: if another run holds the lock and `waits` is false.
        UsageError: if the folder or the file `lock` cannot be created.
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
