"""The digests of GGUF files that were used before, so that an unchanged file is not hashed again."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from personalized_soups.bases.cache import bases_folder
from personalized_soups.errors import SoupError
from personalized_soups.files.atomic import new_file
from personalized_soups.files.digest import digest_file
from personalized_soups.files.strict_json import parse_json


def digest_once(path: Path) -> str:
    """Return the BLAKE3 digest of a file. If the file has the size and time of an earlier call, it is not read.

    Raises:
        FileFormatError: if `path` is not a regular file.
        InputError: if the file cannot be read.
    """
    path = path.absolute()
    known = _note_of(path)
    with suppress(OSError, SoupError, KeyError, TypeError):
        note = parse_json(known.read_bytes(), known)
        if (note["path"], note["num_bytes"], note["mtime_ns"]) == _identity(path):
            return str(note["blake3"])
    before = _identity(path) if path.exists() else None
    digest = digest_file(path)
    if before is not None and before == _identity(path):
        name, num_bytes, mtime_ns = before
        note = {"path": name, "num_bytes": num_bytes, "mtime_ns": mtime_ns, "blake3": digest}
        with suppress(OSError):  # without the note, the file is hashed again next time
            known.parent.mkdir(parents=True, exist_ok=True)
            with new_file(known) as scratch:
                scratch.write_text(json.dumps(note) + "\n", encoding="utf-8")
    return digest


def _identity(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _note_of(path: Path) -> Path:
    return bases_folder() / ".known" / f"{blake3(str(path).encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
