"""The workplace of an output: the folder `.NAME.partial` next to it, in which one run at a time makes the output.

The run holds a lock on the workplace. The lock ends with the process, so an unlocked scratch folder or file was left by
a killed run, regardless of its age. Network file systems (NFS) cannot lock folders. On them, every run creates its own
folder `.NAME.XXXXXXXX.partial` and locks the file `lock` in that folder.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from personalized_soups.errors import UsageError
from personalized_soups.files.locks import LOCK_FILE, folder_with_lock_file, lock_file, lock_folder, remove_if_empty

_NUM_RANDOM_BYTES = 4


@dataclass(frozen=True, slots=True)
class Workplace:
    """The folder in which one run makes its output.

    Attributes:
        folder: the path of the folder.
        is_locked: whether this run has locked the folder. If false, the file system cannot lock folders. The folder
            then has a random name, which no other run uses.
    """

    folder: Path
    is_locked: bool

    @property
    def new(self) -> Path:
        """The unfinished output."""
        return self.folder / "new"

    @property
    def old(self) -> Path:
        """The previous output while it is being replaced."""
        return self.folder / "old"

    @property
    def journal(self) -> Path:
        """The journal of the finished pieces of `new`."""
        return self.folder / "journal"

    def clear(self) -> None:
        """Remove all contents of the workplace and create the empty folder `new`.

        Raises:
            UsageError: if something cannot be removed.
        """
        self.clear_dead()
        self.new.mkdir()

    def clear_dead(self) -> None:
        """Remove all files that a killed run left in the workplace. The lock file of this run is kept.

        Raises:
            UsageError: if something cannot be removed.
        """
        for path in self.folder.iterdir():
            if self.is_locked or path.name != LOCK_FILE:
                remove(path)


def workplace_of(target: Path) -> Path:
    """Return the path of the workplace of `target`. The workplace need not exist."""
    return target.parent / f".{target.name}.partial"


@contextmanager
def claimed(target: Path) -> Iterator[Workplace]:
    """Yield the workplace of `target`, locked against other runs. It may contain files that a killed run left.

    Missing parent folders are created. After the block, the workplace and the created parent folders are removed if
    they are empty.

    Raises:
        OutputExistsError: if another run has locked the workplace.
        UsageError: if a folder cannot be created.
    """
    with _parents(target.parent):
        folder = workplace_of(target)
        descriptor = lock_folder(folder, target)
        if descriptor is None:
            # Wait for the lock: another run may hold it briefly while it checks whether a killed run left the folder.
            with folder_with_lock_file(lambda: _own_name(target), target, waits=True) as folder:
                yield Workplace(folder, is_locked=False)
            return
        try:
            yield Workplace(folder, is_locked=True)
        finally:
            remove_if_empty(folder)
            os.close(descriptor)


@contextmanager
def held(folder: Path, target: Path) -> Iterator[None]:
    """Lock `folder` against other runs during the block. The folder may contain files that a killed run left.

    The folder and its missing parent folders are created. After the block, they are removed if they are empty. If the
    file system can lock neither folders nor files, there is no lock.

    Args:
        folder: the folder.
        target: the output that is made from `folder`. Error messages name it.

    Raises:
        OutputExistsError: if another run has locked the folder.
        UsageError: if the folder cannot be created.
    """
    with _parents(folder.parent):
        descriptor = lock_folder(folder, target)
        if descriptor is None:
            with folder_with_lock_file(lambda: folder, target, waits=False):
                yield
            return
        try:
            yield
        finally:
            remove_if_empty(folder)
            os.close(descriptor)


def scratches_of(target: Path) -> list[Path]:
    """Return the scratch folders and files of `target` that have random names. Running or killed runs made them."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{{2 * _NUM_RANDOM_BYTES}}}\.partial")
    try:
        names = os.listdir(target.parent)  # noqa: PTH208 # the names alone
    except OSError:
        return []
    return [target.parent / name for name in sorted(names) if pattern.fullmatch(name)]


@contextmanager
def abandoned(scratch: Path) -> Iterator[bool]:
    """Yield whether a killed run left the scratch folder or file `scratch`.

    This is so if `scratch` can be locked, because the lock of a killed run ended with its process. In that case
    `scratch` stays locked during the block.
    """
    is_folder = scratch.is_dir() and not scratch.is_symlink()
    try:
        descriptor = lock_file(scratch / LOCK_FILE if is_folder else scratch, waits=False)
    except OSError:  # locked by a running process, removed already, or another user's
        descriptor = None
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def scratch_file(target: Path) -> Iterator[Path]:
    """Yield an empty file with a random name next to `target`. The file is locked during the block and not removed.

    Raises:
        OSError: if the file cannot be created.
    """
    scratch = _own_name(target)
    descriptor = lock_file(scratch, waits=True)
    try:
        yield scratch
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents.

    Raises:
        UsageError: if `path` cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise UsageError(
            f"the remains of an interrupted run cannot be removed: {error.strerror}",
            where=str(path),
            mend="delete this path yourself, or choose another output folder",
        ) from error


def _own_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(_NUM_RANDOM_BYTES)}.partial")


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Create `folder` and its missing parents. After the block, remove the created folders that are empty."""
    missing = [step for step in (folder, *folder.parents) if not os.path.lexists(step)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the output's parent folder cannot be made: {error.strerror}",
            where=str(folder),
            mend="choose an output below a folder with write permission",
        ) from error
    try:
        yield
    finally:
        for parent in missing:  # the deepest first
            remove_if_empty(parent)
