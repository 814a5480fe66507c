"""The model folders that were made from GGUF files, in the user's cache folder.

A folder is made once for each content of a file, all or nothing, and is used from then on. Its base.json records the
source and the size, time and digest of every file. A damaged folder is noticed when it is found, and made again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from personalized_soups.bases.gguf_model import write_model
from personalized_soups.bases.gguf_tensors import Progress
from personalized_soups.errors import OutputExistsError, RunError, SoupError, UsageError
from personalized_soups.files.atomic import files_below, new_folder
from personalized_soups.files.cache_folder import VARIABLE, cache_folder
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import TINY_BASE_FILE
from personalized_soups.files.locks import FULL_DISK, lock_file
from personalized_soups.files.strict_json import parse_json

# Increase it when `write_model` writes other files for the same source, so that older folders are made again.
_FORMAT = 1
_DIGITS = 16

_log = logging.getLogger(__name__)


def bases_folder() -> Path:
    """Return the folder of all model folders in the cache. The folder need not exist."""
    return cache_folder() / "bases"


def find_model(digest: str) -> Path | None:
    """Return the model folder that was made from a file with this BLAKE3 digest, or None.

    Sizes and times of all files are compared with the record. A file with another time is hashed, so a copied cache is
    still used. A damaged folder is not returned.
    """
    for folder in _folders(digest):
        problem = _problem(folder, digest)
        if problem is None:
            return folder
        _log.warning("the model folder %s is not used: %s", folder, problem)
    return None


def make_model(source: Path, digest: str, name: str, on_progress: Progress | None = None) -> Path:
    """Return the model folder of a GGUF file. It is made if the cache does not have it.

    If another process is making the folder, this call waits until that process has ended.

    Args:
        source: the GGUF file.
        digest: the BLAKE3 digest of the file.
        name: the name of the base, with which the name of the folder begins.
        on_progress: receives the number of bytes of tensors that are written, and of all bytes.

    Raises:
        SoupError: all errors of `write_model`.
        UsageError: if the cache folder cannot be written.
        RunError: if the disk is full.
    """
    target = bases_folder() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-') or 'base'}-{digest[:_DIGITS]}"
    with _reported(target), _locked(digest):
        # another process may have made the folder while this one waited
        for folder in _folders(digest):
            if _problem(folder, digest) is None:
                return folder
        with new_folder(target, overwrite=True) as scratch:
            dtype = write_model(source, scratch, on_progress)
            _write_record(scratch, source, digest, dtype)
    return target


def _folders(digest: str) -> list[Path]:
    return sorted(bases_folder().glob(f"[!.]*-{digest[:_DIGITS]}"))


def _write_record(folder: Path, source: Path, digest: str, dtype: str) -> None:
    contents = {}
    for name in sorted(files_below(folder)):
        status = (folder / name).stat()
        contents[name] = {
            "num_bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "blake3": digest_file(folder / name),
        }
    record = {
        "format": _FORMAT,
        "source": {"name": source.name, "num_bytes": source.stat().st_size, "blake3": digest},
        "dtype": dtype,
        "files": [TINY_BASE_FILE, *contents],
        "contents": contents,
    }
    (folder / TINY_BASE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _problem(folder: Path, digest: str) -> str | None:
    """Return why a folder of the cache is not the model of a file with this digest, or None if it is."""
    path = folder / TINY_BASE_FILE
    try:
        record = parse_json(path.read_bytes(), path)
        if record["format"] != _FORMAT:
            return f"it was made by another version of this package (format {record['format']})"
        if record["source"]["blake3"] != digest:
            return "it was made from another file"
        for name, written in record["contents"].items():
            if problem := _changed(folder / name, written):
                return problem
    except (OSError, SoupError, KeyError, TypeError, AttributeError) as error:
        return f"{path.name} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def _changed(path: Path, written: dict[str, Any]) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return f"{path.name} is missing"
    if status.st_size != written["num_bytes"]:
        return f"{path.name} has {status.st_size} bytes instead of {written['num_bytes']}"
    if status.st_mtime_ns != written["mtime_ns"] and digest_file(path) != written["blake3"]:
        return f"{path.name} has changed since it was written"
    return None


@contextmanager
def _locked(digest: str) -> Iterator[None]:
    """Let one process at a time make the folder for a digest. The others wait."""
    path = bases_folder() / f".{digest[:_DIGITS]}.lock"
    bases_folder().mkdir(parents=True, exist_ok=True)
    descriptor = lock_file(path, waits=True)
    try:
        yield
    finally:
        # removed while it is locked: a process that waits for the lock then locks a new file
        with suppress(OSError):
            path.unlink()
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    mend = f"set the environment variable {VARIABLE} to a folder that you can write to"
    try:
        yield
    except RunError as error:  # the disk is full
        elsewhere = f"free some disk space, or set the environment variable {VARIABLE} to a folder on another disk"
        raise RunError(error.what, where=error.where, mend=elsewhere) from error
    except OutputExistsError as error:
        if not os.path.lexists(target):  # without locks, another run may be making the folder
            raise
        raise UsageError(
            error.what,
            where=error.where,
            mend=f"move this folder elsewhere, or set the environment variable {VARIABLE} to another folder",
        ) from error
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(
            f"the cache folder cannot be written: {error.strerror}", where=str(target.parent), mend=mend
        ) from error
