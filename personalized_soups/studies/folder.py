"""Manage the folder of a study: the path of each file, and the answers of an interrupted run.

Every stage writes files. A run skips work whose files exist, and rejects the folder of a run with other settings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from personalized_soups.errors import OutputExistsError

SETTINGS_FILE = "study.json"
RESULTS_FILE = "results.json"
PICTURES = ("combinations", "sweeps", "persona")


class StudyFolder:
    """The paths of one study below `root`.

    Attributes:
        root: the folder of the study.
        settings: the file of the settings that a resumed run must share.
        results: the file of the results.
        report: the report in Markdown.
        examples: the file of one prompt with the answers of several models.
        samples: the file of some prompts with the answers of all systems side by side, in Markdown.
        seconds: the file of the seconds that each stage took.
        memory: the file of the memory that each stage needed.
        fluency: the file of the calibrated bounds of fluency.
        pool: the file of the base's sampled answers, from which pairs are made.
        experts: the folder of the experts.
        merged: the folder of the merged adapters.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = root / SETTINGS_FILE
        self.results = root / RESULTS_FILE
        self.report = root / "report.md"
        self.examples = root / "examples.json"
        self.samples = root / "samples.md"
        self.seconds = root / "seconds.json"
        self.memory = root / "memory.json"
        self.fluency = root / "fluency.yaml"
        self.pool = root / "pool.jsonl"
        self.experts = root / "experts"
        self.merged = root / "merged"

    def pairs(self, side: str) -> Path:
        """Return the path of the preference pairs for one side."""
        return self.root / "pairs" / f"{side}.jsonl"

    def picture(self, name: str) -> Path:
        """Return the path of the PNG file for a picture."""
        return self.root / f"{name}.png"

    def answers(self, stage: str) -> AnswerFile:
        """Return the file of the answers that one stage generates."""
        return AnswerFile(self.root / "answers" / f"{stage}.jsonl")

    def external(self, name: str) -> Path:
        """Return the file of the prompts that were drawn from an external file."""
        return self.root / "external" / f"{name}.json"

    def soup(self, method: str, sides: Sequence[str]) -> Path:
        """Return the folder of the merged adapter for a combination of sides."""
        return self.merged / method / "+".join(sides)

    def clear(self) -> None:
        """Remove the files that a study writes. Other files in the folder stay."""
        for name in ("pairs", "answers", "external", "questions", "judges"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path in (self.experts, self.merged):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.settings, self.results, self.report, self.pool, self.examples, self.samples):
            path.unlink(missing_ok=True)
        for path in (self.seconds, self.memory, self.fluency):
            path.unlink(missing_ok=True)
        for name in PICTURES:
            self.picture(name).unlink(missing_ok=True)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Create the folder, or check that it holds a run with the same settings. Such a run can be resumed.

        Raises:
            OutputExistsError: if the folder holds a run with other settings, or other files and no study, or is a file.
        """
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        if self.settings.is_file():
            recorded = self.settings.read_text(encoding="utf-8")
            if recorded == text:
                return
            differing = ", ".join(_differing(json.loads(text), recorded))
            raise OutputExistsError(
                f"the folder holds a study with other settings: {differing or 'its record cannot be read'}",
                where=str(self.root),
                mend="choose another output folder, or pass overwrite=True to start again",
            )
        if os.path.lexists(self.root) and not self.root.is_dir():
            raise OutputExistsError(
                "the output is a file, not a folder", where=str(self.root), mend="choose another output folder"
            )
        if self.root.is_dir() and any(self.root.iterdir()):
            raise OutputExistsError(
                f"the folder holds files, but it is not a study's folder because it has no {SETTINGS_FILE}",
                where=str(self.root),
                mend="choose another output folder",
            )
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.settings, text)


class AnswerFile:
    """A file of answers with one JSON line for each job. A line that a kill left incomplete is skipped when reading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, list[str]]:
        """Return the answers of all complete lines, by the name of the job."""
        return {line["job"]: line["answers"] for line in self._lines()}

    def measured(self) -> dict[str, list[Any]]:
        """Return what was measured of each answer, by the name of the job, for jobs whose answers were measured."""
        return {line["job"]: line["measured"] for line in self._lines() if "measured" in line}

    def add(self, job: str, answers: Sequence[str], measured: Sequence[Any] = ()) -> None:
        """Append the answers of one job, and what was measured of each, as JSON values."""
        line = {"job": job, "answers": list(answers), **({"measured": list(measured)} if measured else {})}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            yield entry


def _differing(settings: object, recorded: str) -> list[str]:
    """Return the keys, such as `recipe.num_prompts`, whose values differ from those in a record's text."""
    try:
        return list(_differing_keys(settings, json.loads(recorded), ""))
    except ValueError:
        return []


def _differing_keys(ours: object, theirs: object, key: str) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted({*ours, *theirs}):
            yield from _differing_keys(ours.get(name), theirs.get(name), f"{key}.{name}" if key else name)
    elif ours != theirs:
        yield key


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: a kill leaves the old file or the new file, but no part of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def write_results(
    folder: StudyFolder,
    content: Mapping[str, Any],
    picture: str,
    *,
    draw: Callable[[Path], object],
    report: Callable[[str], str],
    page: Path | None = None,
    images: Path | None = None,
) -> None:
    """Write results.json, the picture and the report of a study.

    Args:
        folder: the folder of the study.
        content: the content of results.json.
        picture: the name of the picture, without `.png`.
        draw: a function that draws the picture as a PNG file.
        report: a function that returns the report in Markdown, given the picture's path relative to the report.
        page: also write the report to this Markdown page.
        images: the folder of the page's picture, if not the page's own.
    """
    write_text(folder.results, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    draw(folder.picture(picture))
    write_text(folder.report, report(f"{picture}.png"))
    if page is not None:
        target = (images or page.parent) / f"{picture}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(target)
        write_text(page, report(os.path.relpath(target, page.parent)))
