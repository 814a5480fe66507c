"""The folder of a run: the files of each step, and a record of what each step was made from.

run/
    manifest.json           all steps, their keys and costs, written at the end of each step
    steps/NAME/             the files of a step
    recipe/                 the recipe, if a command has written it
    work/NAME/              an unfinished step; a rerun continues in it if nothing has changed
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from personalized_soups.errors import FileFormatError, OutputExistsError
from personalized_soups.files.digest import digest_file
from personalized_soups.files.locks import lock_file

MANIFEST = "manifest.json"
RECIPE_FOLDER = "recipe"
_FORMAT = 1
_KEY_FILE = ".key"
_SECONDS_FILE = ".seconds"
_LOCK = ".lock"
_SCRATCH = ".manifest.partial"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What is recorded of a finished step.

    Attributes:
        key: the digest of all on which the files depend (`Step.key`).
        output: the digest of the files.
        seconds: how long the attempt took that finished the step.
        num_bytes: the size of the files.
    """

    key: str
    output: str
    seconds: float
    num_bytes: int


class RunFolder:
    """The folder of a run, which only one run uses at a time.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records: dict[str, StepRecord] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder during the block, and read its manifest. A missing folder is created.

        Raises:
            OutputExistsError: if another run holds the folder, or the path is a file or a folder of something else.
            FileFormatError: if the manifest is damaged.
        """
        self.check()
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = lock_file(self.root / _LOCK, waits=False)
        except BlockingIOError as error:
            raise OutputExistsError(
                "another run is using this folder", where=str(self.root), mend="wait for it, or choose another folder"
            ) from error
        try:
            self._records = self.read()
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def read(self) -> dict[str, StepRecord]:
        """Return the record of each finished step.

        Raises:
            FileFormatError: if the manifest is damaged.
        """
        path = self.root / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {name: StepRecord(**record) for name, record in content["steps"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"the manifest of the run is damaged: {error}",
                where=str(path),
                mend="delete it: steps whose files are whole are then made again",
            ) from error

    def files(self, name: str) -> Path:
        """Return the folder of a step's files."""
        return self.root / "steps" / name

    def record(self, name: str) -> StepRecord | None:
        """Return the record of a finished step whose files are there, or None."""
        found = self._records.get(name)
        return found if found is not None and self.files(name).is_dir() else None

    def is_whole(self, name: str) -> bool:
        """Return whether the files of a finished step still have the digest that its record has."""
        found = self.record(name)
        return found is not None and digest_of(self.files(name))[0] == found.output

    def begin(self, name: str, key: str) -> Path:
        """Return the folder in which a step with this key works. Work on another key is discarded."""
        work = self.root / "work" / name
        mark = work / _KEY_FILE
        if not (mark.is_file() and mark.read_text(encoding="utf-8") == key):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            mark.write_text(key, encoding="utf-8")
        return work

    def finish(self, name: str, key: str, seconds: float) -> StepRecord:
        """Move the work of a step to its files, and record the step."""
        work, files = self.root / "work" / name, self.files(name)
        (work / _SECONDS_FILE).write_text(str(seconds), encoding="utf-8")
        files.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(files, ignore_errors=True)
        work.rename(files)  # with its key: if the process is killed now, `adopt` finds the finished files
        return self._add(name, key, seconds)

    def adopt(self, name: str, key: str) -> StepRecord | None:
        """Record a step that was finished and moved with this key, but not recorded. Return None if there is none."""
        mark = self.files(name) / _KEY_FILE
        found = self._records.get(name)
        if (found is not None and found.key == key) or not mark.is_file() or mark.read_text(encoding="utf-8") != key:
            return None
        return self._add(name, key, recorded_seconds(self.files(name)))

    def _add(self, name: str, key: str, seconds: float) -> StepRecord:
        output, num_bytes = digest_of(self.files(name))
        self._records[name] = StepRecord(key, output, seconds, num_bytes)
        self._write({each: self._records[each] for each in sorted(self._records)})
        return self._records[name]

    def _write(self, records: Mapping[str, StepRecord]) -> None:
        content: dict[str, Any] = {"format_version": _FORMAT}
        content["steps"] = {name: asdict(record) for name, record in records.items()}
        scratch = self.root / _SCRATCH
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        scratch.replace(self.root / MANIFEST)

    def check(self) -> None:
        """Check that the folder is missing, empty or that of a run.

        Raises:
            OutputExistsError: if the path is a file, or a folder of something else.
        """
        if not os.path.lexists(self.root):
            return
        if not self.root.is_dir():
            raise OutputExistsError("the path is a file", where=str(self.root), mend="choose another folder")
        known = {MANIFEST, _SCRATCH, _LOCK, RECIPE_FOLDER, "steps", "work"}
        others = [entry.name for entry in self.root.iterdir() if entry.name not in known]
        if others and not (self.root / MANIFEST).is_file():
            raise OutputExistsError(
                f"the folder holds files, but it is not that of a run: {min(others)!r}",
                where=str(self.root),
                mend="choose another folder",
            )


def recorded_seconds(files: Path) -> float:
    """Return how long the attempt took that finished the step whose files these are."""
    return float((files / _SECONDS_FILE).read_text(encoding="utf-8"))


def digest_of(folder: Path) -> tuple[str, int]:
    """Return the hex digest of the names and bytes of all files below a folder, and their size.

    Hidden files and folders do not count.
    """
    parts, num_bytes = [], 0
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            parts.append([relative.as_posix(), digest_file(path)])
            num_bytes += path.stat().st_size
    return str(blake3(json.dumps(parts).encode()).hexdigest()), num_bytes
