"""What a study is: everything that its run follows from, and how it tells of its progress."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from personalized_soups.adapters.provenance import library_versions
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.evaluation import StudyRecipe
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.tiny import BASE_FOLDER
from personalized_soups.tiny.corpus import Split, prompts
from personalized_soups.training.progress import StepReport

Combination = tuple[str, ...]


class Bar(Protocol):
    """Hears how far a stage is."""

    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        """Say that `done` units of work are done; the figures stand beside."""


Stage = Callable[[str, int | None], AbstractContextManager[Bar]]


@dataclass(frozen=True, slots=True)
class Study:
    """One run, all that it follows from."""

    seed: int = 0
    basis: Literal["free", "shared"] = "free"
    num_workers: int = 2
    device: str = "auto"
    base: Path = BASE_FOLDER
    recipe: StudyRecipe = field(default_factory=lambda: load(shipped_recipe("evaluation/quickstart.yaml"), StudyRecipe))
    training: TrainingRecipe | None = None
    catalogue: Catalogue = field(default_factory=lambda: load(shipped_recipe("dimensions/tiny.yaml"), Catalogue))

    @property
    def training_recipe(self) -> TrainingRecipe:
        """How the experts are trained: as given, or the shipped recipe of the basis."""
        name = "train/tiny.yaml" if self.basis == "free" else "train/tiny-shared.yaml"
        return self.training or load(shipped_recipe(name), TrainingRecipe)

    @property
    def sides(self) -> dict[str, tuple[str, str]]:
        """Dimension -> its low and its high side."""
        found = {}
        for name, dimension in self.catalogue.dimensions.items():
            by_end = {side.end: side_name for side_name, side in dimension.sides.items()}
            found[name] = (by_end["low"], by_end["high"])
        return found

    @property
    def combinations(self) -> list[Combination]:
        """Every way to take one side of each dimension."""
        return list(itertools.product(*self.sides.values()))

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """Return this study's prompts on topics of one split."""
        return tuple(prompts(split, count, self.seed))

    def settings(self) -> dict[str, object]:
        """Return what an interrupted run must share with the one that goes on with it."""
        return {
            "seed": self.seed,
            "basis": self.basis,
            "recipe": self.recipe.model_dump(mode="json"),
            "training": self.training_recipe.model_dump(mode="json"),
            "catalogue": self.catalogue.model_dump(mode="json"),
            "versions": library_versions("torch", "transformers", "peft", "trl"),
        }


class TrainingBar:
    """Shows the trainings of several experts as one bar of optimizer steps."""

    def __init__(self, bar: Bar, num_experts: int) -> None:
        self._bar = bar
        self._num_experts = num_experts
        self._done: dict[str, int] = {}
        self._steps: dict[str, int] = {}

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """Count what an interrupted training has done."""
        self._done[side], self._steps[side] = step, num_steps

    def advance(self, side: str, report: StepReport) -> None:
        """Show one step; experts that have not begun are taken to be as long as the others."""
        self._done[side] = report.step
        self._bar.update(
            sum(self._done.values()),
            total=round(sum(self._steps.values()) / len(self._steps) * self._num_experts),
            expert=side,
            loss=report.loss,
            margin=report.margin,
            accuracy=report.accuracy,
        )

    def note(self, side: str, text: str) -> None:
        """Leave it out: a study makes its own pairs."""

    def end(self, side: str) -> None:
        """Say nothing more."""
