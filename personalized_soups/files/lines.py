"""JSON Lines files that grow during a run, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.errors import OutputExistsError, UsageError
from personalized_soups.files.workplace import claimed, workplace_of

# Bytes read at a time.
_BLOCK = 1 << 20


@dataclass(slots=True)
class GrowingLines:
    """A JSON Lines file to which this run appends rows.

    An existing file is not changed before the first rows are added, so a run that fails earlier changes nothing.

    Attributes:
        path: the file.
        num_done: the number of complete lines that an earlier run wrote and this run keeps.
    """

    path: Path
    num_done: int
    _journal: Path
    _settings: Mapping[str, Any]
    _is_begun: bool

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line for each row. If the process is killed, at most the last line is incomplete.

        Raises:
            OSError: if the rows cannot be written.
        """
        self.begin()
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)

    def begin(self) -> None:
        """Start an empty file and record the settings. Do nothing if the file was started by this or a resumed run."""
        if not self._is_begun:
            self.path.unlink(missing_ok=True)
            self._journal.write_text(json.dumps(self._settings), encoding="utf-8")
            self.path.touch()
            self._is_begun = True


@contextmanager
def growing_lines(path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[GrowingLines]:
    """Yield a growing file that only this run can write. The file is complete when the block ends without an error.

    Until then, the settings are stored in a hidden folder next to the file. A later run resumes the file only if its
    settings are the same.

    Args:
        path: the file. Missing parent folders are created.
        settings: the JSON values on which the lines depend.
        overwrite: start from scratch if the file is complete or was started with other settings. The old file is
            removed when the first rows are written.

    Raises:
        OutputExistsError: if `path` is a folder, if the file is complete and `overwrite` is false, or if another run is
            writing the file.
        UsageError: if the file was started with other settings and `overwrite` is false. The message names them.
        OSError: if the file cannot be written.
    """
    if path.is_dir():
        raise OutputExistsError(
            "the output must be a file, but this path is a folder",
            where=str(path),
            mend="give a file, such as answers.jsonl",
        )
    # Check before locking, to fail early, and after locking, because another run may have ended in between.
    _check_free(path, overwrite=overwrite)
    with claimed(path) as place:
        _check_free(path, overwrite=overwrite)
        begun = _begun(place.journal) if path.exists() else None
        num_done = 0 if begun is None else _sound_lines(path)
        if begun is not None and num_done and begun != settings:
            if not overwrite:
                differing = sorted(key for key in settings if begun.get(key) != settings[key])
                raise UsageError(
                    "the file is from an interrupted run with other settings; "
                    f"these settings differ: {', '.join(differing)}",
                    where=str(path),
                    mend="give the settings of that run to continue it, or pass overwrite=True to start from scratch",
                )
            num_done = 0
        lines = GrowingLines(path, num_done, place.journal, settings, num_done > 0)
        yield lines
        lines.begin()
        place.journal.unlink()


def read_lines(path: Path) -> list[Any]:
    """Return the values of a JSON Lines file."""
    # not splitlines, which also splits at characters that JSON strings may contain (U+2028, U+0085)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def is_whole(path: Path, num_lines: int) -> bool:
    """Return whether a file exists, is complete, and has `num_lines` lines."""
    return path.is_file() and not _is_growing(path) and len(read_lines(path)) == num_lines


def _is_growing(path: Path) -> bool:
    return (workplace_of(path) / "journal").exists()


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite and not _is_growing(path):
        raise OutputExistsError(
            "the output file exists already", where=str(path), mend="choose another name, or pass overwrite=True"
        )


def _begun(journal: Path) -> Any:
    try:
        return json.loads(journal.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _sound_lines(path: Path) -> int:
    """Return the number of complete lines of a file, and cut off an incomplete last line."""
    count, sound = 0, 0
    with path.open("r+b") as file:
        while block := file.read(_BLOCK):
            count += block.count(b"\n")
            if (last := block.rfind(b"\n")) >= 0:
                sound = file.tell() - len(block) + last + 1
        os.ftruncate(file.fileno(), sound)
    return count
