"""Check that no prompt of a recipe has two uses: training, choosing and testing."""

from __future__ import annotations

from typing import Literal, TypeAlias

from personalized_soups.declare.run_recipe import AnyStep, RunRecipe
from personalized_soups.declare.run_steps import (
    AnswersStep,
    ChooseStep,
    InterferenceStep,
    Prompts,
    RolloutsStep,
    SweepStep,
    TrainStep,
)
from personalized_soups.errors import DeclarationError
from personalized_soups.generation.prompts import read_prompts
from personalized_soups.studies.pipeline.prompts import prompts_of

_Use: TypeAlias = Literal["training", "choosing", "testing"]


def check_held_out(recipe: RunRecipe) -> None:
    """Check that the prompts of tests are not trained on or used for a choice, and those of choices not trained on.

    Raises:
        DeclarationError: if two steps share a prompt.
        InputError: if a file of prompts cannot be read.
    """
    seen: dict[str, tuple[_Use, str]] = {}
    for name, step in recipe.steps.items():
        file, use = getattr(step, "prompts", None), _use_of(step)
        if file is None or use is None:
            continue
        path = recipe.relative_path(file)
        if not path.is_file():
            continue  # the step itself says that it is missing
        for prompt in prompts_of(path, step) if isinstance(step, Prompts) else read_prompts(path):
            before, other = seen.setdefault(prompt, (use, name))
            if before != use:
                raise DeclarationError(
                    f"the steps {other!r} and {name!r} share the prompt {prompt!r}, but one is for {before} and the "
                    f"other for {use}",
                    where=recipe.place("steps", name, "prompts"),
                    mend="give each its own prompts, so that nothing is tested on what it was made from",
                )


def _use_of(step: AnyStep) -> _Use | None:
    match step:
        case RolloutsStep() | TrainStep():
            return "training"
        case ChooseStep():
            return "choosing"
        case AnswersStep() | SweepStep() | InterferenceStep():
            return "testing"
        case _:
            return None
