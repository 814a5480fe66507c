"""A program that runs a recipe and kills itself at a moment at which it uses the file system.

Arguments: the recipe, the folder of the run, and the number of the moment, or 0 for none. It prints how many there are.
"""

# ruff: noqa: T201 # it prints for the test that started it

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.studies.pipeline.engine import run_steps
from personalized_soups.studies.pipeline.expanding import steps_of
from personalized_soups.studies.pipeline.run_folder import RunFolder


def main(recipe: str, out: str, number: int) -> int:
    """Run the recipe, and return the number of calls that reached for a file of the run."""
    moments = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal moments
        if event.partition(".")[0] in {"open", "os", "shutil"} and any(str(each).startswith(out) for each in arguments):
            moments += 1
            if moments == number:
                os.kill(os.getpid(), signal.SIGKILL)

    steps = steps_of(load(Path(recipe), RunRecipe), device="cpu")
    sys.addaudithook(hook)
    for _ in run_steps(steps, RunFolder(Path(out)), workers=1):
        pass
    return moments


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
