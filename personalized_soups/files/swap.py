"""Putting a finished folder in its place: by one rename, or where an old one stands there, by one exchange of the two.

At no moment is there neither, but on systems that cannot exchange: there the next run puts the old one back.
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
from personalized_soups.files.file_names import EXPERT_FILE, SOUP_FILE, TINY_BASE_FILE
from personalized_soups.files.syscalls import exchange
from personalized_soups.files.workplace import Workplace

# A folder that holds one of these was written by this tool and may be replaced with `overwrite`.
MARKERS = (SOUP_FILE, EXPERT_FILE, TINY_BASE_FILE)

_MAX_MARKER_BYTES = 64 << 20

_log = logging.getLogger(__name__)


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise unless `target` can be written: absent, or with `overwrite` empty or made by this tool.

    Raises:
        OutputExistsError: saying why not.
        UsageError: if `target` is the root of a file system.
    """
    if not target.name:
        raise UsageError("the output cannot be the root folder", where=str(target), mend="name a new folder")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        kind = "a link" if target.is_symlink() else "a file"
        raise OutputExistsError(
            f"the output is {kind}, not a folder", where=str(target), mend="choose another output folder"
        )
    if not overwrite:
        raise OutputExistsError(
            "the output folder is there already", where=str(target), mend="choose another one, or pass overwrite=True"
        )
    if any(target.iterdir()) and not any((target / marker).is_file() for marker in MARKERS):
        raise OutputExistsError(
            f"the output folder holds files that this tool did not write (it has no {' or '.join(MARKERS)})",
            where=str(target),
            mend="choose another output folder; overwrite=True replaces only what this tool wrote",
        )


def files_below(folder: Path) -> set[str]:
    """Return the paths of all files and links below `folder`, relative to it, with forward slashes."""
    found: set[str] = set()
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found.update((Path(root) / name).relative_to(folder).as_posix() for name in (*names, *links))
    return found


def publish(place: Workplace, target: Path, *, overwrite: bool, durable: bool) -> None:
    """Put `place.new` at `target`; with `durable` all of it is on the disk before, and its name after.

    Raises:
        OutputExistsError: if `target` has appeared meanwhile, or holds files of others.
        OSError: if it cannot be moved.
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
    """Bring a swap to its end, begun just now or by a run that was killed in it: the old folder back, or away."""
    if not os.path.lexists(place.new):
        place.journal.unlink(missing_ok=True)  # of a folder that is in its place
    if not os.path.lexists(place.old):
        return
    if not os.path.lexists(target):
        place.old.rename(target)
        return
    if foreign := files_below(place.old) - files_below(target) - _written_by_us(place.old):
        kept = _free_name(target)
        place.old.rename(kept)
        _log.warning(
            "%s held files that this tool did not write (%s): the old folder is kept as %s",
            target,
            ", ".join(sorted(foreign)[:3]),
            kept,
        )
        return
    shutil.rmtree(place.old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is below it, is on the disk.

    Raises:
        OSError: if it cannot be written there.
    """
    if path.is_dir():
        for root, _, names in os.walk(path):
            for name in names:
                _sync_file(Path(root) / name)
            sync_folder(Path(root))
    else:
        _sync_file(path)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk.

    Raises:
        OSError: if they cannot be written there.
    """
    if sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(place: Workplace, target: Path) -> None:
    place.new.rename(place.old)  # what stands there is looked through before it is taken away
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
                "the output folder appeared while this was running",
                where=str(target),
                mend="another run wrote it: choose another output folder",
            ) from error
        raise


def _written_by_us(folder: Path) -> set[str]:
    """Return the files that a marker in `folder` lists under its key `files`, and the markers themselves."""
    written = set(MARKERS)
    for marker in MARKERS:
        path = folder / marker
        try:
            if path.is_file() and path.stat().st_size <= _MAX_MARKER_BYTES:
                listed = json.loads(path.read_bytes()).get("files", [])
                written.update(name for name in listed if isinstance(name, str))
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            continue  # a marker that says nothing lists nothing: what it does not list is kept
    return written


def _free_name(target: Path) -> Path:
    number = 1
    while os.path.lexists(candidate := target.with_name(f"{target.name}.replaced-{number}")):
        number += 1
    return candidate


def _sync_file(path: Path) -> None:
    if path.is_symlink():
        return  # it is part of its folder
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
