"""Define the settings of a study, and the progress bars that it updates."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import library_versions
from personalized_soups.declare.dimension import AnyScorer, Catalogue
from personalized_soups.declare.evaluation import StudyRecipe
from personalized_soups.declare.loader import load
from personalized_soups.declare.prompt_set import Split
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.evaluation.grading import Gate, Grader, ScorerJudge
from personalized_soups.studies.prompt_sources import PromptSource, TinyPrompts
from personalized_soups.tiny import BASE_FOLDER
from personalized_soups.training.progress import StepReport

Combination = tuple[str, ...]


class Bar(Protocol):
    """Shows the progress of one stage."""

    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        """Show that `done` of `total` units of work are done, with further figures next to the bar."""


Stage = Callable[[str, int | None], AbstractContextManager[Bar]]
"""Opens the bar of a stage. The arguments are its title and its number of units of work, or None if unknown."""


@dataclass(frozen=True, slots=True)
class Study:
    """The settings of one study.

    Attributes:
        seed: the random seed of all stages.
        basis: with `free`, each expert has its own A. With `shared`, all experts have the same frozen A.
        num_workers: the number of worker processes for training and answering.
        device: `auto`, `cpu` or `cuda`.
        base: the base model's folder or hub id.
        prompts: where prompts come from.
        recipe: the number of prompts, the methods and their weights, and the systems to compare.
        training: the training recipe of the experts. None takes the recipe of the embedded base for the basis.
        catalogue: the dimensions, each with a low and a high side. If the recipe names sides, only these are kept.

    Raises:
        DeclarationError: if a dimension has not exactly one low and one high side, or the recipe's judges do not fit
            the catalogue.
    """

    seed: int = 0
    basis: Literal["free", "shared"] = "free"
    num_workers: int = 2
    device: str = "auto"
    base: Path | str = BASE_FOLDER
    prompts: PromptSource = field(default_factory=TinyPrompts)
    recipe: StudyRecipe = field(default_factory=lambda: load(shipped_recipe("evaluation/quickstart.yaml"), StudyRecipe))
    training: TrainingRecipe | None = None
    catalogue: Catalogue = field(default_factory=lambda: load(shipped_recipe("dimensions/tiny.yaml"), Catalogue))

    def __post_init__(self) -> None:
        object.__setattr__(self, "catalogue", self.recipe.catalogue_of(self.catalogue))
        for name, dimension in self.catalogue.dimensions.items():
            if sorted(side.end for side in dimension.sides.values()) != ["high", "low"]:
                raise DeclarationError(
                    f"a study needs one low and one high side in every dimension, but {name!r} has the sides "
                    + ", ".join(f"{side} ({declared.end})" for side, declared in dimension.sides.items()),
                    where=self.catalogue.place("dimensions", name),
                    mend="give a catalogue in which each dimension has one side with `end: low` and one with "
                    "`end: high`",
                )
        self.recipe.check_judges(self.catalogue)

    @property
    def training_recipe(self) -> TrainingRecipe:
        """The training recipe of the experts: `training` if it is given, else that of the embedded base."""
        name = "train/tiny.yaml" if self.basis == "free" else "train/tiny-shared.yaml"
        return self.training or load(shipped_recipe(name), TrainingRecipe)

    @property
    def sides(self) -> dict[str, tuple[str, str]]:
        """The low and the high side of each dimension, by the dimension's name."""
        ends = {}
        for name, dimension in self.catalogue.dimensions.items():
            by_end = {side.end: side_name for side_name, side in dimension.sides.items()}
            ends[name] = (by_end["low"], by_end["high"])
        return ends

    @property
    def combinations(self) -> list[Combination]:
        """All combinations of sides. A combination has one side of each dimension."""
        return list(itertools.product(*self.sides.values()))

    def drawn(self, split: Split, count: int) -> tuple[str, ...]:
        """Return `count` prompts of one split."""
        return tuple(self.prompts.draw(split, count, self.seed))

    @property
    def train_prompts(self) -> tuple[str, ...]:
        """The prompts of which pairs are made."""
        return self.drawn("train", self.recipe.pairs.num_prompts)

    @property
    def validation_prompts(self) -> tuple[str, ...]:
        """The prompts on which methods and weights are chosen."""
        return self.drawn("validation", self.recipe.selection.num_prompts)

    @property
    def test_prompts(self) -> tuple[str, ...]:
        """The held-out prompts on which all systems are scored."""
        return self.drawn("test", self.recipe.num_prompts)

    def judge_prompts(self, count: int) -> tuple[str, ...]:
        """Return `count` validation prompts on which neither methods nor weights are chosen.

        Raises:
            InputError: if there are too few.
        """
        used = self.validation_prompts
        try:
            drawn = self.drawn("validation", len(used) + count)
        except (InputError, ValueError) as fault:
            raise InputError(
                f"a judge needs {count} validation prompts on which nothing is chosen: {fault}",
                where="judges: num_prompts",
                mend="write a smaller number, or add validation prompts",
            ) from fault
        return tuple(prompt for prompt in drawn if prompt not in used)[:count]

    def grader(self, judges: Mapping[str, AnyScorer], gate: Gate | None) -> Grader:
        """Return what grades answers: the catalogue's scorers, a judge for each dimension or none, and a gate."""
        return Grader(self.catalogue, ScorerJudge(self.catalogue, judges) if judges else None, gate)

    def settings(self) -> dict[str, object]:
        """Return the settings that a resumed run must have in common with the interrupted run."""
        prompts = [self.train_prompts, self.validation_prompts, self.test_prompts]
        return {
            "seed": self.seed,
            "basis": self.basis,
            "base": base_fingerprint(self.base),
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
            "recipe": self.recipe.model_dump(mode="json"),
            "training": self.training_recipe.model_dump(mode="json"),
            "catalogue": self.catalogue.model_dump(mode="json"),
            "versions": library_versions("torch", "transformers", "peft", "trl"),
        }


class TrainingBar:
    """Shows the training of several experts as one bar that counts optimizer steps."""

    def __init__(self, bar: Bar, num_experts: int) -> None:
        self._bar = bar
        self._num_experts = num_experts
        self._done: dict[str, int] = {}
        self._steps: dict[str, int] = {}

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """Store the number of finished steps and of all steps of one expert's training."""
        self._done[side], self._steps[side] = step, num_steps

    def advance(self, side: str, report: StepReport) -> None:
        """Show one step. The total assumes the mean number of steps for experts whose training has not begun."""
        self._done[side] = report.step
        self._bar.update(
            sum(self._done.values()),
            total=round(sum(self._steps.values()) / len(self._steps) * self._num_experts),
            expert=side,
            loss=report.loss,
            **report.figures,
        )

    def note(self, side: str, text: str) -> None:
        """Ignore notes on the pairs, because the study makes the pairs itself."""

    def end(self, side: str) -> None:
        """Ignore the end of a training."""
