"""The steps that make models: one for each target or combination, from the steps that a recipe declares."""

from __future__ import annotations

from collections.abc import Iterator

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_steps import (
    ExpertsStep,
    LabelStep,
    MergeStep,
    PairsStep,
    RolloutsStep,
    TrainStep,
)
from personalized_soups.declare.training import OptimizerRecipe
from personalized_soups.errors import InputError
from personalized_soups.files.cache_folder import reply_cache_file
from personalized_soups.files.digest import digest_file
from personalized_soups.studies.pipeline.expansion import Expansion
from personalized_soups.studies.pipeline.kinds import RECIPES, Label, Merge, Pair, Sample, TakeExpert, Train
from personalized_soups.studies.pipeline.prompts import prompts_of
from personalized_soups.studies.pipeline.run_folder import digest_of
from personalized_soups.studies.pipeline.steps import Step
from personalized_soups.studies.pipeline.targets import combination_name


def rollout_steps(run: Expansion, name: str, step: RolloutsStep) -> Iterator[Step]:
    """Return the sampling of answers."""
    prompts = run.file(step.prompts, name, "prompts")
    extent = f"{step.num_samples * len(prompts_of(prompts, step))} answers"
    yield run.step(name, name, (), Sample(run.world, step, prompts), {"prompts": digest_file(prompts)}, extent=extent)


def label_steps(run: Expansion, name: str, step: LabelStep) -> Iterator[Step]:
    """Return the labelling of each target."""
    judge = None if step.judge is None else run.file(step.judge, name, "judge")
    files = {} if judge is None else {"judge": digest_file(judge)}
    cache = None if judge is None else reply_cache_file()
    for target in run.targets(name):
        label = Label(run.world, step, target, judge, cache)
        own = {"side": target.name, "weights": dict(target.weights), **files}
        if judge is None:
            own["scorers"] = run.files_of_scorers(run.world.catalogue.scorer_of(side) for side in target.sides)
        yield run.step(name, f"{name}-{target.name}", (step.rollouts,), label, own)


def pair_steps(run: Expansion, name: str, step: PairsStep) -> Iterator[Step]:
    """Return the choice of pairs of each target, or one for a single policy."""
    labelled = run.targets(step.labels)
    if step.conditioned:
        needs = {f"{step.labels}-{target.name}": target for target in labelled}
        pair = Pair(run.world, step, needs)
        yield run.step(name, f"{name}-{name}", tuple(needs), pair, {})
        return
    for target in labelled:
        labels = f"{step.labels}-{target.name}"
        pair = Pair(run.world, step, {labels: target})
        yield run.step(name, f"{name}-{target.name}", (labels,), pair, {"side": target.name})


def train_steps(run: Expansion, name: str, step: TrainStep) -> Iterator[Step]:
    """Return the training of each target.

    Raises:
        DeclarationError: if the training recipe is invalid.
    """
    path = run.file(step.recipe, name, "recipe")
    recipe = load(path, RECIPES[step.method])
    files = {"recipe": digest_file(path)}
    for target in run.targets(name):
        own = {"side": target.name, "weights": dict(target.weights), **files}
        extent = _extent(recipe.for_side(target.name).optimizer)
        if step.prompts is not None:
            prompts = run.file(step.prompts, name, "prompts")
            train = Train(run.world, step, target, prompts, path)
            own["prompts"] = digest_file(prompts)
            yield run.step(name, f"{name}-{target.name}", (), train, own, extent=extent)
        else:
            pairs = f"{step.pairs}-{target.name}"
            train = Train(run.world, step, target, pairs, path)
            yield run.step(name, f"{name}-{target.name}", (pairs,), train, own, extent=extent)


def _extent(optimizer: OptimizerRecipe) -> str:
    size = optimizer.batch_size * optimizer.gradient_accumulation
    if optimizer.max_steps is None:
        return f"{optimizer.epochs:g} epochs in steps of {size}"
    return f"{optimizer.max_steps} steps of {size}"


def taken_steps(run: Expansion, name: str, step: ExpertsStep) -> Iterator[Step]:
    """Return the copy of each expert that was trained before.

    Raises:
        InputError: if a side has no expert.
    """
    folder = run.recipe.relative_path(step.folder)
    library = ExpertLibrary.open(folder)
    for target in run.targets(name):
        if target.name not in library:
            raise InputError(
                f"there is no expert for the side {target.name!r} in {str(folder)!r}",
                where=run.recipe.place("steps", name, "folder"),
                mend="train it, or declare a catalogue without this side",
            )
        found = library[target.name].folder.resolve()
        take = TakeExpert(found, target.name)
        yield run.step(name, f"{name}-{target.name}", (), take, {"files": digest_of(found)[0]})


def merge_steps(run: Expansion, name: str, step: MergeStep) -> Iterator[Step]:
    """Return the merge of each combination."""
    run.check_targets(name, "experts", step.experts, ("side",))
    run.check_can_merge(name, "kind")
    for combination in run.combinations:
        needs = tuple(f"{step.experts}-{side}" for side in combination)
        merge = Merge(step, combination)
        own = {"sides": list(combination)}
        yield run.step(name, f"{name}-{combination_name(combination)}", needs, merge, own)
