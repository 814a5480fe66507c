"""A small run whose steps write text, for tests and for a script that tests kill: python steps_of_tests.py FOLDER."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.studies.pipeline.engine import run_steps
from personalized_soups.studies.pipeline.run_folder import RunFolder
from personalized_soups.studies.pipeline.steps import Step

LINES = 4


@dataclass(frozen=True)
class Write:
    """Writes some lines of text, one after the other, after those of an interrupted attempt."""

    text: str

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Callable[[Any], None]) -> None:
        path = work / "text.txt"
        begun = path.read_text().splitlines() if path.exists() else []
        given = [(folder / "text.txt").read_text().splitlines()[-1] for folder in inputs.values()]
        for number in range(len(begun), LINES):
            with path.open("a") as file:
                file.write(" ".join([self.text, str(number), *given]) + "\n")
            report(number)


@dataclass(frozen=True)
class WaitFor:
    """Ends when another step has written its files."""

    path: Path

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Callable[[Any], None]) -> None:
        while not self.path.is_file():
            time.sleep(0.01)
        (work / "text.txt").write_text("seen\n")


def step(name: str, *needs: str, text: str | None = None, is_result: bool = False) -> Step:
    said = text or name
    return Step(name, {"text": said}, needs, Write(said), where=f"recipe.yaml: {name}", is_result=is_result)


def small_run(**texts: str) -> list[Step]:
    """Return a run: two branches from one pool, which meet in a report."""
    return [
        step("report", "left", "right", is_result=True),
        step("left", "pool", text=texts.get("left")),
        step("right", "pool", text=texts.get("right")),
        step("pool", text=texts.get("pool")),
    ]


def main(folder: Path, workers: int) -> None:
    """Run the steps, and print a line for each event, so that a test can stop the process at any of them."""

    def say(name: str, content: object) -> None:
        sys.stdout.write(f"{name} {content}\n")
        sys.stdout.flush()

    for finished in run_steps(small_run(), RunFolder(folder), workers=workers, on_report=say):
        say(finished.name, "finished")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
