"""Move a finished output folder to its target path. An old folder at that path is exchanged for the new folder.

On Linux the exchange is atomic, so the old or the new folder is at the path at every moment. Systems that cannot
exchange folders atomically rename the old folder first and then the new one. If the process is killed between the two
renames, the next run moves the old folder back.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from personalized_soups.errors import OutputExistsError, UsageError
from personalized_soups.files.file_names import (
    BASIS_FILE,
    CLASSIFIER_FILE,
    EXPERT_FILE,
    POOL_FILE,
    SOUP_FILE,
    TINY_BASE_FILE,
)
from personalized_soups.files.syscalls import exchange
from personalized_soups.files.workplace import Workplace

# A folder with one of these files was written by this package. `overwrite` may replace it.
MARKERS = (SOUP_FILE, EXPERT_FILE, TINY_BASE_FILE, POOL_FILE, BASIS_FILE, CLASSIFIER_FILE)

_MAX_MARKER_BYTES = 64 << 20

_log = logging.getLogger(__name__)


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Check that an output folder may be written to `target`.

    This is so if `target` does not exist. With `overwrite`, `target` may also be an empty folder or a folder that this
    package wrote.

    Raises:
        OutputExistsError: if `target` exists and may not be replaced.
        UsageError: if `target` is the root of a file system.
    """
    if not target.name:
        raise UsageError(
            "the output cannot be the root folder", where=str(target), mend="give the path of a new folder"
        )
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        kind = "a link" if target.is_symlink() else "a file"
        raise OutputExistsError(
            f"the output is {kind}, not a folder", where=str(target), mend="choose another output folder"
        )
    if not overwrite:
        raise OutputExistsError(
            "the output folder exists already",
            where=str(target),
            mend="choose another output folder, or pass overwrite=True",
        )
    if any(target.iterdir()) and not any((target / marker).is_file() for marker in MARKERS):
        raise OutputExistsError(
            f"the output folder has files that psoups did not write: it has none of {', '.join(MARKERS)}",
            where=str(target),
            mend="choose another output folder; overwrite=True replaces only folders that psoups wrote",
        )


def files_below(folder: Path) -> set[str]:
    """Return the paths of all files and links below `folder`, relative to `folder` and with forward slashes."""
    paths: set[str] = set()
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        paths.update((Path(root) / name).relative_to(folder).as_posix() for name in (*names, *links))
    return paths


def publish(place: Workplace, target: Path, *, overwrite: bool, durable: bool) -> None:
    """Move the finished folder `place.new` to `target`.

    Args:
        place: the workplace that contains the finished folder.
        target: the output folder.
        overwrite: replace an existing folder that this package wrote.
        durable: sync the files to the disk before the move, and the name of the folder after the move.

    Raises:
        OutputExistsError: if `target` was created in the meantime, or if this package did not write it.
        OSError: if the folder cannot be moved.
    """
    if durable:
        sync(place.new)
    if os.path.lexists(target):
        check_replaceable(target, overwrite=overwrite)
        _swap(place, target)
    else:
        _rename_new(place.new, target)
    if durable:
        sync_folder(target.parent)
    settle(place, target)


def settle(place: Workplace, target: Path) -> None:
    """Finish an exchange of folders, which this run made or during which an earlier run was killed.

    If no folder is at `target`, the old folder is moved back to it. Otherwise the old folder is removed, or renamed if
    it has files that this package did not write.
    """
    if not os.path.lexists(place.new):
        place.journal.unlink(missing_ok=True)  # the folder that the journal describes was moved to the target
    if not os.path.lexists(place.old):
        return
    if not os.path.lexists(target):
        place.old.rename(target)
        return
    if foreign := files_below(place.old) - files_below(target) - _written_by_us(place.old):
        kept = _free_name(target)
        place.old.rename(kept)
        _log.warning(
            "the old folder %s had files that psoups did not write (%s), so it was renamed to %s",
            target,
            ", ".join(sorted(foreign)[:3]),
            kept,
        )
        return
    shutil.rmtree(place.old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all files below it, is written to the disk.

    Raises:
        OSError: if writing to the disk fails.
    """
    if path.is_dir():
        for root, _, names in os.walk(path):
            for name in names:
                _sync_file(Path(root) / name)
            sync_folder(Path(root))
    else:
        _sync_file(path)


def sync_folder(folder: Path) -> None:
    """Wait until the file names of a folder are written to the disk.

    Raises:
        OSError: if writing to the disk fails.
    """
    if sys.platform == "win32":
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(place: Workplace, target: Path) -> None:
    place.new.rename(place.old)  # `settle` checks the old folder's files before it is removed
    is_swapped = False
    try:
        is_swapped = exchange(place.old, target)
    finally:
        if not is_swapped:
            place.old.rename(place.new)
    if is_swapped:
        return
    target.rename(place.old)
    place.new.rename(target)


def _rename_new(new: Path, target: Path) -> None:
    try:
        new.rename(target)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise OutputExistsError(
                "another run made the output folder in the meantime",
                where=str(target),
                mend="choose another output folder",
            ) from error
        raise


def _written_by_us(folder: Path) -> set[str]:
    """Return the names in `MARKERS`, and the files that those markers in `folder` list under the key `files`."""
    written = set(MARKERS)
    for marker in MARKERS:
        path = folder / marker
        try:
            if path.is_file() and path.stat().st_size <= _MAX_MARKER_BYTES:
                listed = json.loads(path.read_bytes()).get("files", [])
                written.update(name for name in listed if isinstance(name, str))
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            continue  # treated like a marker that lists no files; files that no marker lists are kept
    return written


def _free_name(target: Path) -> Path:
    number = 1
    while os.path.lexists(candidate := target.with_name(f"{target.name}.replaced-{number}")):
        number += 1
    return candidate


def _sync_file(path: Path) -> None:
    if path.is_symlink():
        return  # a link is stored in its folder, which is synced separately
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
