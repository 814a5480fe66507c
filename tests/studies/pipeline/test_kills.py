"""A run that is killed at any moment, again and again, ends with the report of a run that was not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.studies.pipeline.test_run import DIMENSIONS, RECIPE, TRAIN

NUM_KILLS = 20
SYSTEMS = """
  chosen: {kind: choose, experts: experts, prompts: validation.txt, max_new_tokens: 8, weights: {linear: [0.5, 1.0]}}
  base: {kind: answers, prompts: test.txt, max_new_tokens: 8, batch_size: 2}
  soup: {kind: answers, prompts: test.txt, max_new_tokens: 8, batch_size: 2, experts: experts, choice: chosen}
  sweep: {kind: sweep, prompts: test.txt, max_new_tokens: 8, batch_size: 2, experts: experts, weight: 0.6, num_steps: 3}
  report: {kind: report, systems: [base, soup], primary: [soup, base], fronts: [sweep]}
"""


def run(recipe: Path, out: Path, moment: int = 0) -> tuple[int, int]:
    """Run the recipe, and kill it at a moment. Return its exit code, and the number of moments if it ended."""
    command = [sys.executable, "-m", "tests.studies.pipeline.killed_run", str(recipe), str(out), str(moment)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, 0 if done.returncode else int(done.stdout)


def report(out: Path) -> dict[str, Any]:
    """Return the files of a report, without the seconds that trainings took."""
    folder = out / "steps" / "report"
    results = json.loads((folder / "results.json").read_text())
    for cost in results["costs"]:
        del cost["seconds"]
    return {"results": results, "answers": (folder / "answers.parquet").read_bytes()}


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_report(small_base: Path, tmp_path: Path) -> None:
    (tmp_path / "dimensions.yaml").write_text(DIMENSIONS)
    (tmp_path / "train.yaml").write_text(TRAIN + "save_steps: 1\n")
    (tmp_path / "prompts.txt").write_text("wash the kettle\nrub the towel\ndry the old soap\n")
    (tmp_path / "validation.txt").write_text("wash the soap\nrub the kettle\n")
    (tmp_path / "test.txt").write_text("wash the towel\nrub the soap\ndry the old kettle\n")
    recipe = tmp_path / "run.yaml"
    without_soups = RECIPE.replace("  soups: {kind: merge, experts: experts, weight: 0.6}\n", "")
    recipe.write_text(without_soups.replace("BASE", str(small_base)) + SYSTEMS)
    code, num_moments = run(recipe, tmp_path / "whole")
    assert code == 0
    assert num_moments > 100
    expected = report(tmp_path / "whole")
    rng, kills, number = random.Random(0), 0, 0
    while kills < NUM_KILLS:
        out = tmp_path / f"killed{number}"
        number += 1
        while (code := run(recipe, out, rng.randint(1, num_moments // 3) if kills < NUM_KILLS else 0)[0]) != 0:
            kills += 1
        assert report(out) == expected
