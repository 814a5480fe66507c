"""Folders that appear whole or not at all: made beside their target, then put in place in one step."""

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
    """Yield an empty scratch folder beside `target`; it becomes `target` when the block ends well.

    Nothing is left behind when the block raises, Ctrl-C included; what a killed run left is taken away by the next one.
    One run at a time writes to `target`. With `overwrite` an existing folder that this tool wrote is exchanged for the
    new one in one step; files in it that this tool did not write are not deleted: the old folder is then kept beside
    the new one as `NAME.replaced-1`. With `durable` all is on the disk before it is put in place. Modes follow the
    umask.

    Raises:
        OutputExistsError: if `target` is there and `overwrite` is false, or is not a folder of this tool's; if another
            run is writing it.
        UsageError: if no folder can be made there.
        RunError: if the disk is full.
    """
    target = _absolute(target)
    mend = "free some space or write to another disk; nothing half-written was left"
    with _room_told(target, mend), _ready(target, overwrite=overwrite) as place:
        try:
            place.clear()
            yield place.new
            publish(place, target, overwrite=overwrite, durable=durable)
        finally:
            _end(place, target)


@dataclass(frozen=True, eq=False, slots=True)
class Resumable:
    """A scratch folder that outlives an interruption, and the pieces in it that an earlier run has finished."""

    folder: Path
    done: frozenset[str]
    _journal: Journal
    _durable: bool

    def mark(self, name: str) -> None:
        """Note that a piece is finished: the file or folder of that path below `folder`. Safe between threads.

        Raises:
            ValueError: if it is not there, or not below `folder`.
            OSError: if the note cannot be written.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or not os.path.lexists(self.folder / path):
            raise ValueError(f"{name!r}: no file or folder in {self.folder}")
        if self._durable:
            sync(self.folder / path)
            for parent in path.parents:
                sync_folder(self.folder / parent)
        self._journal.add(path.as_posix())


@contextmanager
def resumable_folder(
    target: Path | str, identity: str, overwrite: bool = False, *, durable: bool = False
) -> Iterator[Resumable]:
    """Yield a scratch folder as new_folder does, which is kept when the block is interrupted after a piece was marked.

    The next run with the same target and identity finds the marked pieces in place (`done`); all else was taken away,
    so that a piece is either whole or absent. A run of another identity begins anew. What is kept holds until the
    machine is started anew, and beyond with `durable`; nothing is kept where there are no locks (Windows), nor where
    the block finds input or usage at fault.

    Args:
        target: the folder.
        identity: all that decides the bytes of the pieces: digests of the inputs, options, versions.
        overwrite: as in new_folder.
        durable: as in new_folder; each piece is on the disk before it is marked, too.

    Raises:
        SoupError: as new_folder does.
    """
    target = _absolute(target)
    mend = "free some space and run the same again: it goes on from what is finished; or write to another disk"
    with _room_told(target, mend), _ready(target, overwrite=overwrite) as place:
        keeps = place.is_locked
        try:
            with _journal(place, identity, durable=durable) as journal:
                try:
                    yield Resumable(place.new, frozenset(journal.names), journal, durable)
                except (InputError, UsageError):  # to mend them is to make something else
                    keeps = False
                    raise
                finally:
                    keeps = keeps and bool(journal.names)
            publish(place, target, overwrite=overwrite, durable=durable)
            keeps = False
        finally:
            if keeps:
                settle(place, target)
                _log.warning("what is finished is kept in %s: the same run goes on from there", place.folder)
            else:
                _end(place, target)


def check_target(target: Path | str, *, overwrite: bool = False) -> None:
    """Raise what new_folder would raise before its block, and take away what a run killed at its very end left behind.

    Raises:
        SoupError: as new_folder does.
    """
    target = _absolute(target)
    if _has_leftovers(target):
        with _ready(target, overwrite=overwrite):
            pass
    else:
        check_replaceable(target, overwrite=overwrite)


@contextmanager
def new_file(target: Path | str) -> Iterator[Path]:
    """Yield an empty scratch file beside `target`; it replaces `target` in one step when the block ends well.

    Nothing is left behind when the block raises; what killed runs left is taken away by the next one.

    Raises:
        OSError: if it cannot be written.
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
    """Yield the workplace of a target that can be written, where what killed runs left is settled."""
    if not _has_leftovers(target):  # else there may be a swap to settle first
        check_replaceable(target, overwrite=overwrite)
    with claimed(target) as place:
        if not place.is_locked:
            _clear_abandoned(target)
        settle(place, target)
        if not os.path.lexists(place.journal) and not os.path.lexists(place.old):  # there is nothing to go on with
            place.clear_dead()
        check_replaceable(target, overwrite=overwrite)
        yield place


def _has_leftovers(target: Path) -> bool:
    return os.path.lexists(workplace_of(target)) or bool(scratches_of(target))


def _clear_abandoned(target: Path) -> None:
    """Take away what killed runs left in scratch folders and files with names of their own; never a living run's."""
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
    """Yield the journal of a workplace whose `new` holds what the journal names and nothing else."""
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
def _room_told(target: Path, mend: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        full = error.errno in FULL_DISK
        what = "no space is left on the device" if full else "a limit on file sizes is reached"
        raise RunError(f"{what}: {error.strerror}", where=str(target), mend=mend) from error


def _absolute(target: Path | str) -> Path:
    return Path(os.path.abspath(target))  # noqa: PTH100 # resolve() would follow the link that is refused
