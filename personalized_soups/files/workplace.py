"""The folder beside an output in which one run at a time makes it: `.NAME.partial`, held by a lock while it runs."""

from __future__ import annotations

import errno
import os
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


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where one run makes its output.

    `is_locked` is false where the system or the file system has no locks: the folder then has a name of its own, which
    no other run will look for.
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
        for path in self.folder.iterdir():
            remove(path)
        self.new.mkdir()


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
    made = _make_parents(target.parent)
    try:
        folder = workplace_of(target)
        descriptor = _lock(folder, target)
        try:
            if descriptor is None:
                folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
                _make(folder, target)
            yield Workplace(folder, descriptor is not None)
        finally:
            _remove_if_empty(folder)
            if descriptor is not None:
                os.close(descriptor)
    finally:
        for parent in made:
            _remove_if_empty(parent)


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
            raise OutputExistsError(
                "another run is writing it", where=str(target), mend="wait for it, or choose another output folder"
            ) from error
        except OSError:  # a file system without locks
            _remove_if_empty(folder)
            return None
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            return descriptor


def _leads_to(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.lstat(), os.fstat(descriptor))
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


def _make_parents(folder: Path) -> list[Path]:
    """Make `folder` and what is missing above it; return what was made, deepest first."""
    missing = [step for step in (folder, *folder.parents) if not os.path.lexists(step)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the output's parent folder cannot be made: {error.strerror}",
            where=str(folder),
            mend="choose an output below a folder that you may write to",
        ) from error
    return missing


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # something stands there
