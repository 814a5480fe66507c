"""Parse JSON files strictly: they must be UTF-8, without repeated keys and without NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from personalized_soups.errors import FileFormatError
from personalized_soups.files.regular import check_no_lfs_pointer


def parse_json(data: bytes, path: Path, *, constants: bool = False) -> Any:
    """Parse the bytes of a JSON file and return the value.

    Args:
        data: the file's bytes.
        path: the file, which error messages name.
        constants: whether to accept NaN and Infinity. They are not JSON, but transformers writes them to config.json.

    Raises:
        FileFormatError: if the file is not UTF-8 or not JSON, repeats a key, or is a Git LFS pointer.
    """
    check_no_lfs_pointer(data, path)
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_repeats,
            parse_constant=float if constants else _refuse_constant,
        )
        if b"\\u" in data:  # an escape may be half a surrogate pair, which is not valid Unicode
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(
            path, f"the file is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} is invalid"
        ) from None
    except UnicodeEncodeError as error:
        raise damaged(path, f"the file has a string that is not valid Unicode: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"the file is not JSON: {str(error)[:200]}") from None
    return parsed


def shown(name: str) -> str:
    """Return a name from a file with control characters escaped and long names cut, so that a message can show it."""
    return name if name.isprintable() and len(name) <= 300 else ascii(name[:300])


def damaged(path: Path, what: str) -> FileFormatError:
    """Return an error which says that a file is damaged. `what` describes the damage."""
    return FileFormatError(what, where=str(path), mend="download or write the file again: it is damaged or incomplete")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(repeated)!r} is repeated")
    return table


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
