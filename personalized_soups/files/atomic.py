"""Folders that appear whole or not at all: written beside their target, then put in place by one rename."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personalized_soups.errors import OutputExistsError, RunError, UsageError

# A folder that holds one of these was written by this tool and may be replaced with `overwrite`.
MARKERS = ("soup.json", "expert.json", "base.json")

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = _FULL_DISK | {errno.EFBIG}
_MAX_MARKER_BYTES = 64 << 20

_log = logging.getLogger(__name__)


@contextmanager
def new_folder(target: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty scratch folder beside `target`; it becomes `target` when the block ends well.

    Nothing is left behind when the block raises, Ctrl-C included. With `overwrite` an existing folder that this tool
    wrote is swapped for the new one; files in it that this tool did not write are not deleted: the old folder is then
    kept beside the new one as `NAME.replaced-1`. Modes follow the umask.

    Raises:
        OutputExistsError: if `target` is there and `overwrite` is false, or is not a folder of this tool's.
        UsageError: if no folder can be made there.
        RunError: if the disk is full.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 # resolve() would follow the link that is refused below
    check_replaceable(target, overwrite=overwrite)
    made = _make_parents(target.parent)
    scratch = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        _make_scratch(scratch, target)
        yield scratch
        _publish(scratch, target, overwrite=overwrite)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in made:
            _remove_if_empty(folder)
        if isinstance(error, OSError) and error.errno in _REFUSED:
            what = "no space is left on the device" if error.errno in _FULL_DISK else "a limit on file sizes is reached"
            raise RunError(
                f"{what}: {error.strerror}",
                where=str(target),
                mend="free some space or write to another disk; nothing half-written was left",
            ) from error
        raise


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
            "the output folder is there already", where=str(target), mend="choose another one, or pass --overwrite"
        )
    if any(target.iterdir()) and not any((target / marker).is_file() for marker in MARKERS):
        raise OutputExistsError(
            f"the output folder holds files that this tool did not write (it has no {' or '.join(MARKERS)})",
            where=str(target),
            mend="choose another output folder; --overwrite replaces only what this tool wrote",
        )


def files_below(folder: Path) -> set[str]:
    """Return the paths of all files and links below `folder`, relative to it, with forward slashes."""
    found: set[str] = set()
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found.update((Path(root) / name).relative_to(folder).as_posix() for name in (*names, *links))
    return found


def _publish(scratch: Path, target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        _rename_new(scratch, target)
        return
    check_replaceable(target, overwrite=overwrite)
    aside = scratch.with_name(scratch.name.removesuffix(".partial") + ".old")
    try:
        target.rename(aside)
        scratch.rename(target)
    except BaseException:  # Ctrl-C may come before, between or after the two: the disk says which
        if os.path.lexists(aside):
            if os.path.lexists(target):
                target.rename(scratch)
            aside.rename(target)
        raise
    if foreign := files_below(aside) - files_below(target) - _written_by_us(aside):
        kept = _free_name(target)
        aside.rename(kept)
        _log.warning(
            "%s held files that this tool did not write (%s): the old folder is kept as %s",
            target,
            ", ".join(sorted(foreign)[:3]),
            kept,
        )
        return
    shutil.rmtree(aside, ignore_errors=True)


def _rename_new(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
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
            if path.stat().st_size <= _MAX_MARKER_BYTES:
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


def _make_scratch(scratch: Path, target: Path) -> None:
    try:
        scratch.mkdir()
    except OSError as error:
        if error.errno in _REFUSED:
            raise
        raise UsageError(
            f"the output folder cannot be made: {error.strerror}",
            where=str(target),
            mend="choose a shorter name, or an output below a folder that you may write to",
        ) from error


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
        return  # somebody else put something there meanwhile
