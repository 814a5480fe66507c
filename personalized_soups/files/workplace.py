"""The folder beside an output in which one run at a time makes it: `.NAME.partial`, held by a lock while it runs.

A killed run's lock ends with its process, so a scratch folder or file that nobody holds is dead, whatever its age.
Network file systems (NFS) lock files but no folders: there a run makes a folder of its own, `.NAME.XXXXXXXX.partial`,
and holds the file `lock` in it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from personalized_soups.errors import OutputExistsError, UsageError

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_ROOM = FULL_DISK | {errno.EFBIG}

_LOCK = "lock"
_NUM_RANDOM_BYTES = 4


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where one run makes its output.

    `is_locked` is false where the system or the file system cannot lock folders: the folder then has a name of its own,
    in which no other run will work.
    """

    folder: Path
    is_locked: bool

    @property
    def new(self) -> Path:
        """The output as it is made."""
        return self.folder / "new"

    @property
    def old(self) -> Path:
        """Of two folders that change places, the one that is going."""
        return self.folder / "old"

    @property
    def journal(self) -> Path:
        """What of `new` is finished."""
        return self.folder / "journal"

    def clear(self) -> None:
        """Take away all that is in it and make an empty `new`.

        Raises:
            UsageError: if something may not be taken away.
        """
        self.clear_dead()
        self.new.mkdir()

    def clear_dead(self) -> None:
        """Take away what a killed run left, but for the lock that this run holds.

        Raises:
            UsageError: if something may not be taken away.
        """
        for path in self.folder.iterdir():
            if self.is_locked or path.name != _LOCK:
                remove(path)


def workplace_of(target: Path) -> Path:
    """Return where the workplace of a target is, there or not."""
    return target.parent / f".{target.name}.partial"


@contextmanager
def claimed(target: Path) -> Iterator[Workplace]:
    """Yield the workplace of `target`, which no other run has while the block runs; it may hold what a killed run left.

    Missing parents are made. They, and the workplace, are taken away again if nothing is left in them.

    Raises:
        OutputExistsError: if another run has it.
        UsageError: if no folder can be made there.
    """
    with _parents(target.parent):
        folder = workplace_of(target)
        descriptor = _lock(folder, target)
        if descriptor is None:
            with _folder_of_its_own(target) as folder:
                yield Workplace(folder, is_locked=False)
            return
        try:
            yield Workplace(folder, is_locked=True)
        finally:
            _remove_if_empty(folder)
            os.close(descriptor)


@contextmanager
def held(folder: Path, target: Path) -> Iterator[None]:
    """Hold `folder` while the block runs, so that no other run can; it may hold what a killed run left.

    The folder and missing parents are made. They are taken away again if nothing is left in them. Where the file system
    locks neither folders nor files, nothing is held.

    Args:
        folder: what is held.
        target: the output that is made from it, for errors.

    Raises:
        OutputExistsError: if another run holds it.
        UsageError: if no folder can be made there.
    """
    with _parents(folder.parent):
        descriptor = _lock(folder, target)
        if descriptor is None:
            with _locked_by_file(folder, target):
                yield
            return
        try:
            yield
        finally:
            _remove_if_empty(folder)
            os.close(descriptor)


def scratches_of(target: Path) -> list[Path]:
    """Return the scratch folders and files of a target that have names of their own, of living runs and dead ones."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{{2 * _NUM_RANDOM_BYTES}}}\.partial")
    try:
        names = os.listdir(target.parent)  # noqa: PTH208 # the names alone
    except OSError:
        return []
    return [target.parent / name for name in sorted(names) if pattern.fullmatch(name)]


@contextmanager
def abandoned(scratch: Path) -> Iterator[bool]:
    """Yield whether `scratch` is a dead run's; if so nobody else takes it for one while the block runs.

    It is dead if its lock can be had: a killed run's ended with its process.
    """
    is_folder = scratch.is_dir() and not scratch.is_symlink()
    try:
        descriptor = _lock_file(scratch / _LOCK if is_folder else scratch, waits=False)
    except OSError:  # held by a living run; gone already; or somebody else's
        descriptor = None
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def scratch_file(target: Path) -> Iterator[Path]:
    """Yield an empty file beside `target` with a name of its own, held while the block runs; it is left there.

    Raises:
        OSError: if it cannot be made.
    """
    scratch = _own_name(target)
    descriptor = _lock_file(scratch, waits=True)
    try:
        yield scratch
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder.

    Raises:
        UsageError: if it may not be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise UsageError(
            f"what a run that was ended left there cannot be taken away: {error.strerror}",
            where=str(path),
            mend="delete it yourself, or choose another output folder",
        ) from error


def _lock(folder: Path, target: Path) -> int | None:
    """Make `folder` where it is missing and lock it; return the descriptor that holds the lock, None without locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        with suppress(FileExistsError):
            _make(folder, target)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # the run that had it has ended between the two calls
        except OSError as error:
            raise _unmakable(error, target) from error
        is_ours = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the lock is the folder's, not its path's: the run that had it may have taken it away
            is_ours = _leads_to(folder, descriptor)
        except BlockingIOError as error:
            raise _busy(target) from error
        except OSError:  # a file system that cannot lock folders
            _remove_if_empty(folder)
            return None
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            return descriptor


def _lock_file(path: Path, *, waits: bool) -> int | None:
    """Make a file where it is missing and lock it; return the descriptor that holds the lock, None without locks.

    Raises:
        BlockingIOError: if another run holds it and `waits` is false.
        OSError: if it cannot be made, for one because its folder is gone.
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
def _folder_of_its_own(target: Path) -> Iterator[Path]:
    while True:
        folder = _own_name(target)
        _make(folder, target)
        try:
            descriptor = _lock_file(folder / _LOCK, waits=True)
        except FileNotFoundError:
            continue  # another run took it for a dead one's before it was locked
        break
    try:
        yield folder
    finally:
        _unlock_file(folder, descriptor)


@contextmanager
def _locked_by_file(folder: Path, target: Path) -> Iterator[None]:
    while True:
        with suppress(FileExistsError):
            _make(folder, target)
        try:
            descriptor = _lock_file(folder / _LOCK, waits=False)
        except FileNotFoundError:
            continue  # the run that had it has ended between the two calls
        except BlockingIOError as error:
            raise _busy(target) from error
        except OSError as error:
            raise _unmakable(error, target) from error
        break
    try:
        yield
    finally:
        _unlock_file(folder, descriptor)


def _unlock_file(folder: Path, descriptor: int | None) -> None:
    """Take `folder` away if nothing but its lock is left in it, and let go of the lock."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
    _remove_if_empty(folder)
    if descriptor is not None:
        os.close(descriptor)


def _own_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(_NUM_RANDOM_BYTES)}.partial")


def _busy(target: Path) -> OutputExistsError:
    return OutputExistsError(
        "another run is writing it", where=str(target), mend="wait for it, or choose another output folder"
    )


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


def _unmakable(error: OSError, target: Path) -> UsageError:
    return UsageError(
        f"the output folder cannot be made: {error.strerror}",
        where=str(target),
        mend="choose a shorter name, or an output below a folder that you may write to",
    )


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make `folder` and what is missing above it; take away what is empty when the block ends."""
    missing = [step for step in (folder, *folder.parents) if not os.path.lexists(step)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the output's parent folder cannot be made: {error.strerror}",
            where=str(folder),
            mend="choose an output below a folder that you may write to",
        ) from error
    try:
        yield
    finally:
        for parent in missing:  # the deepest first
            _remove_if_empty(parent)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # something stands there
