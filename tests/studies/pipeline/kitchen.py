"""A small world of a run: a catalogue of two dimensions, and experts on a small base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_steps import AnswersStep
from personalized_soups.studies.pipeline.answering import Answer
from personalized_soups.studies.pipeline.mixing import Mixing
from personalized_soups.studies.pipeline.world import World
from tests.experts import write_expert

CATALOGUE = """
dimensions:
  size:
    about: How long the answer is.
    scorer: {kind: length, low: 0, high: 20}
    sides:
      short: {instruction: Be brief., end: low}
      long: {instruction: Tell all.}
  tone:
    about: Whether it is warm.
    scorer: {kind: markers, high: [lamp], low: [soap]}
    sides:
      cold: {instruction: Be cold., end: low}
      warm: {instruction: Be warm.}
"""
PROMPTS = ["wash the kettle", "rub the towel", "dry the old soap"]
COMBINATIONS = (("short", "cold"), ("short", "warm"), ("long", "cold"), ("long", "warm"))


class Kitchen:
    """A world with experts on a small base, and the answers of steps."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder = folder
        (folder / "catalogue.yaml").write_text(CATALOGUE)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        self.world = World(str(base), "00", load(folder / "catalogue.yaml", Catalogue), 0, "cpu")
        for seed, side in enumerate(("short", "long", "cold", "warm")):
            write_expert(folder / f"experts-{side}" / side, seed=seed)
        self.experts = {side: folder / f"experts-{side}" for side in ("short", "long", "cold", "warm")}

    def answered(
        self, *, inputs: dict[str, Path] | None = None, work: str = "work", models: Any = None, **step: Any
    ) -> Path:
        """Run a step, and return the folder of its answers."""
        folder = self.folder / work
        folder.mkdir(exist_ok=True)
        self.answer(models=models, **step)(folder, inputs or {}, lambda _: None)
        return folder

    def answer(self, *, models: Any = None, beta: float | None = None, **step: Any) -> Answer:
        """Return the work of a step."""
        declared = AnswersStep(kind="answers", prompts="prompts.txt", max_new_tokens=8, **step)
        mixing = None
        if declared.experts is not None:
            method = declared.method or (None if declared.choice else "linear")
            mixing = Mixing(self.world.catalogue, beta, declared.weight, declared.choice, method)
        return Answer(self.world, declared, self.folder / "prompts.txt", COMBINATIONS, models or {}, mixing)
