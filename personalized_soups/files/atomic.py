"""Write outputs completely or not at all: make a file or folder next to its target, then move it there in one step."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from personalized_soups.errors import InputError, RunError, UsageError
from personalized_soups.files.journal import Journal
from personalized_soups.files.locks import FULL_DISK, NO_ROOM
from personalized_soups.files.swap import MARKERS, check_replaceable, files_below, publish, settle, sync, sync_folder
from personalized_soups.files.workplace import (
    Workplace,
    abandoned,
    claimed,
    remove,
    scratch_file,
    scratches_of,
    workplace_of,
)

__all__ = [
    "MARKERS",
    "Resumable",
    "check_replaceable",
    "check_target",
    "files_below",
    "new_file",
    "new_folder",
    "resumable_folder",
]

_log = logging.getLogger(__name__)


@contextmanager
def new_folder(target: Path | str, overwrite: bool = False, *, durable: bool = False) -> Iterator[Path]:
    """Yield an empty scratch folder next to `target`, which is moved to `target` when the block ends without an error.

    If the block raises an error or Ctrl-C interrupts it, the scratch folder is removed. If the process is killed, the
    next run with the same target removes the scratch folder. Only one run at a time can write to `target`. File modes
    follow the umask.

    Args:
        target: the output folder.
        overwrite: replace `target` in one step if it is empty or this package wrote it. If it has files that this
            package did not write, it is renamed to `NAME.replaced-1` instead of deleted.
        durable: sync all files to the disk before the move.

    Raises:
        OutputExistsError: if `target` exists and `overwrite` is false, if this package did not write `target`, or if
            another run is writing to it.
        UsageError: if the scratch folder cannot be created.
        RunError: if the disk is full.
    """
    target = _absolute(target)
    mend = "free some disk space, or choose an output folder on another disk (no partial output was left)"
    with _full_disk_reported(target, mend), _ready(target, overwrite=overwrite) as place:
        try:
            place.clear()
            yield place.new
            publish(place, target, overwrite=overwrite, durable=durable)
        finally:
            _end(place, target)


@dataclass(frozen=True, eq=False, slots=True)
class Resumable:
    """A scratch folder that is kept if the run is interrupted. A piece is a file or folder in the scratch folder.

    Attributes:
        folder: the scratch folder.
        done: the pieces that an earlier run has finished, as paths relative to `folder`.
    """

    folder: Path
    done: frozenset[str]
    _journal: Journal
    _durable: bool

    def mark(self, name: str) -> None:
        """Record that the piece at the relative path `name` in `folder` is finished. Thread-safe.

        Raises:
            ValueError: if the piece does not exist, or is not below `folder`.
            OSError: if the record cannot be written.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or not os.path.lexists(self.folder / path):
            raise ValueError(f"{name!r} is not the relative path of an existing file or folder in {self.folder}")
        if self._durable:
            sync(self.folder / path)
            for parent in path.parents:
                sync_folder(self.folder / parent)
        self._journal.add(path.as_posix())


@contextmanager
def resumable_folder(
    target: Path | str, identity: str, overwrite: bool = False, *, durable: bool = False
) -> Iterator[Resumable]:
    """Yield a scratch folder as `new_folder` does, but keep it if the block is interrupted after a piece was marked.

    The next run with the same target and identity finds the marked pieces in the scratch folder, and their names in
    `done`. All other files of the scratch folder are removed, so each piece is either complete or absent. A run with
    another identity starts with an empty folder. The pieces are kept until the next boot; with `durable`, they are kept
    after it, too. No pieces are kept if the system has no locks (Windows), or if the block raises InputError or
    UsageError.

    Args:
        target: the output folder.
        identity: a text that differs if the bytes of the pieces may differ. It covers the digests of the inputs, the
            options and the versions.
        overwrite: as in `new_folder`.
        durable: as in `new_folder`. In addition, each piece is synced to the disk before it is marked.

    Raises:
        SoupError: as `new_folder` does.
    """
    target = _absolute(target)
    mend = (
        "free some disk space and repeat the run, which resumes with the finished pieces, "
        "or choose an output folder on another disk"
    )
    with _full_disk_reported(target, mend), _ready(target, overwrite=overwrite) as place:
        keeps = place.is_locked
        try:
            with _journal(place, identity, durable=durable) as journal:
                try:
                    yield Resumable(place.new, frozenset(journal.names), journal, durable)
                except (
                    InputError,
                    UsageError,
                ):  # a run with other input needs other pieces
                    keeps = False
                    raise
                finally:
                    keeps = keeps and bool(journal.names)
            publish(place, target, overwrite=overwrite, durable=durable)
            keeps = False
        finally:
            if keeps:
                settle(place, target)
                _log.warning(
                    "the finished pieces of this run are kept in %s: repeat the run to continue after them",
                    place.folder,
                )
            else:
                _end(place, target)


def check_target(target: Path | str, *, overwrite: bool = False) -> None:
    """Raise the error that `new_folder` would raise at its start.

    If a run was killed while it exchanged an old folder for a new one, finish that exchange first.

    Raises:
        SoupError: as `new_folder` does.
    """
    target = _absolute(target)
    if _has_leftovers(target):
        with _ready(target, overwrite=overwrite):
            pass
    else:
        check_replaceable(target, overwrite=overwrite)


@contextmanager
def new_file(target: Path | str) -> Iterator[Path]:
    """Yield an empty scratch file next to `target`, which replaces `target` when the block ends without an error.

    If the block raises, the scratch file is removed. Scratch files of killed runs are removed by the next run with the
    same target.

    Raises:
        OSError: if the file cannot be written.
    """
    target = _absolute(target)
    _clear_abandoned(target)
    with scratch_file(target) as scratch:
        try:
            yield scratch
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def _ready(target: Path, *, overwrite: bool) -> Iterator[Workplace]:
    """Yield the workplace of `target` (see workplace.py), after a check that `target` may be written.

    What killed runs left in the workplace is cleaned up.
    """
    if not _has_leftovers(target):  # otherwise an unfinished exchange of folders may have to be finished first
        check_replaceable(target, overwrite=overwrite)
    with claimed(target) as place:
        if not place.is_locked:
            _clear_abandoned(target)
        settle(place, target)
        if not os.path.lexists(place.journal) and not os.path.lexists(place.old):  # nothing to resume
            place.clear_dead()
        check_replaceable(target, overwrite=overwrite)
        yield place


def _has_leftovers(target: Path) -> bool:
    return os.path.lexists(workplace_of(target)) or bool(scratches_of(target))


def _clear_abandoned(target: Path) -> None:
    """Remove the scratch folders and files with random names that killed runs left. Keep those of running processes."""
    for scratch in scratches_of(target):
        with abandoned(scratch) as is_dead:
            if not is_dead:
                continue
            if scratch.is_dir():
                settle(Workplace(scratch, is_locked=False), target)
                shutil.rmtree(scratch, ignore_errors=True)
            else:
                scratch.unlink(missing_ok=True)


@contextmanager
def _journal(place: Workplace, identity: str, *, durable: bool) -> Iterator[Journal]:
    """Yield the journal of the workplace, after removing from `place.new` all files that the journal does not name."""
    place.new.mkdir(exist_ok=True)
    with Journal(place.journal, identity, durable=durable) as journal:
        above = {parent.as_posix() for name in journal.names for parent in PurePosixPath(name).parents}
        _keep_only(str(place.new), "", set(journal.names), above)
        journal.names[:] = [name for name in journal.names if os.path.lexists(place.new / name)]
        if durable:
            sync_folder(place.folder)
            sync_folder(place.folder.parent)
        yield journal


def _keep_only(folder: str, prefix: str, kept: Set[str], above: Set[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in list(entries):
            name = prefix + entry.name
            if name in above and entry.is_dir(follow_symlinks=False):
                _keep_only(entry.path, name + "/", kept, above)
            elif name not in kept:
                remove(Path(entry.path))


def _end(place: Workplace, target: Path) -> None:
    settle(place, target)
    shutil.rmtree(place.folder, ignore_errors=True)


@contextmanager
def _full_disk_reported(target: Path, mend: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        full = error.errno in FULL_DISK
        what = "no space is left on the disk" if full else "a file is larger than the system allows"
        raise RunError(f"{what}: {error.strerror}", where=str(target), mend=mend) from error


def _absolute(target: Path | str) -> Path:
    return Path(os.path.abspath(target))  # noqa: PTH100 # resolve() would follow a link, which is rejected
