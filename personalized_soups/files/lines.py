"""A JSON Lines file that grows while work is done, and goes on where a run was interrupted."""

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

# A last line that was cut short is looked for from the end, in steps.
_BLOCK = 1 << 20


@dataclass(slots=True)
class GrowingLines:
    """The file while this run has it: `num_done` lines were there when it began.

    Nothing is written before the first rows are there, so that a run that fails before leaves everything as it was.
    """

    path: Path
    num_done: int
    _journal: Path
    _settings: Mapping[str, Any]
    _is_begun: bool

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, one a line; a kill costs the last one.

        Raises:
            OSError: if they cannot be written.
        """
        self.begin()
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)

    def begin(self) -> None:
        """Take away what stood there before; what the lines depend on is written before the first of them."""
        if not self._is_begun:
            self.path.unlink(missing_ok=True)
            self._journal.write_text(json.dumps(self._settings), encoding="utf-8")
            self.path.touch()
            self._is_begun = True


@contextmanager
def growing_lines(path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[GrowingLines]:
    """Yield a file that is held by this run alone; it is whole once the block ends well.

    What it was begun with stands beside it, hidden, until then, so that only the same work goes on with it.

    Args:
        path: the file; missing parents are made.
        settings: what the lines depend on, as JSON holds it.
        overwrite: begin anew where the file is there and whole, or was begun with other settings; the old one goes with
            the first rows of the new.

    Raises:
        OutputExistsError: if the file is there and whole, or another run has it.
        UsageError: if it was begun with other settings; it names them.
        OSError: if it cannot be written.
    """
    if path.is_dir():
        raise OutputExistsError("the output is a folder", where=str(path), mend="name a file, e.g. answers.jsonl")
    _check_free(path, overwrite=overwrite)  # at once, and again when no other run can end in between
    with claimed(path) as place:
        _check_free(path, overwrite=overwrite)
        begun = _begun(place.journal) if path.exists() else None
        num_done = 0 if begun is None else _sound_lines(path)
        if begun is not None and num_done and begun != settings:
            if not overwrite:
                differing = sorted(key for key in settings if begun.get(key) != settings[key])
                raise UsageError(
                    f"a run with other settings was interrupted here; it differs in {', '.join(differing)}",
                    where=str(path),
                    mend="give the same options to go on with it, or pass overwrite=True to begin anew",
                )
            num_done = 0
        lines = GrowingLines(path, num_done, place.journal, settings, num_done > 0)
        yield lines
        lines.begin()
        place.journal.unlink()


def read_lines(path: Path) -> list[Any]:
    """Return the values of a JSON Lines file."""
    # not splitlines: it ends lines at characters that JSON leaves in texts (U+2028, U+0085)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def is_whole(path: Path, num_lines: int) -> bool:
    """Return whether a file is there, is no longer growing, and has so many lines."""
    return path.is_file() and not _is_growing(path) and len(read_lines(path)) == num_lines


def _is_growing(path: Path) -> bool:
    return (workplace_of(path) / "journal").exists()


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite and not _is_growing(path):
        raise OutputExistsError(
            "the output file is there already", where=str(path), mend="choose another name, or pass overwrite=True"
        )


def _begun(journal: Path) -> Any:
    try:
        return json.loads(journal.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _sound_lines(path: Path) -> int:
    """Return how many whole lines a file has; what stands after the last of them is cut off."""
    count, sound = 0, 0
    with path.open("r+b") as file:
        while block := file.read(_BLOCK):
            count += block.count(b"\n")
            if (last := block.rfind(b"\n")) >= 0:
                sound = file.tell() - len(block) + last + 1
        os.ftruncate(file.fileno(), sound)
    return count
