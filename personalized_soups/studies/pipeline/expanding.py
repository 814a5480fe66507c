"""Make the steps of a run from its recipe: each for every target, or for every combination of sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_never

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import library_versions
from personalized_soups.bases.place import place_of
from personalized_soups.declare.base_table import named_bases
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import (
    AnswersStep,
    LabelStep,
    MergeStep,
    PairsStep,
    ReportStep,
    RolloutsStep,
    RunRecipe,
    TrainStep,
    named_steps,
)
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.files.cache_folder import reply_cache_file
from personalized_soups.files.digest import digest_file
from personalized_soups.studies.pipeline.answering import Answer
from personalized_soups.studies.pipeline.kinds import Label, Merge, Pair, Sample, Train
from personalized_soups.studies.pipeline.reporting import ReportOn
from personalized_soups.studies.pipeline.steps import Step
from personalized_soups.studies.pipeline.targets import Target, combination_name, targets_of
from personalized_soups.studies.pipeline.world import World

_CATALOGUE = "dimensions/psoups.yaml"
_MODELS = {"side": "one side each", "combination": "one combination each", "single": "all combinations"}


def steps_of(recipe: RunRecipe, *, device: str = "auto") -> list[Step]:
    """Return the steps of a run.

    Args:
        recipe: the recipe.
        device: the device to compute on.

    Raises:
        DeclarationError: if the catalogue is invalid.
        InputError: if a file that the recipe names is missing, or the base cannot be found.
    """
    return list(_Expansion(recipe, device).steps())


class _Expansion:
    def __init__(self, recipe: RunRecipe, device: str) -> None:
        self._recipe = recipe
        base = str(place_of(recipe.base))
        row = named_bases().get(recipe.base)
        shipped = shipped_recipe(_CATALOGUE if row is None else row.dimensions)
        path = shipped if recipe.dimensions is None else recipe.relative_path(recipe.dimensions)
        catalogue = load(path, Catalogue)
        self._world = World(base, base_fingerprint(base), catalogue, recipe.seed, device)
        needed = {name for step in recipe.steps.values() for _, name in named_steps(step)}
        self._results = recipe.steps.keys() - needed
        self._common: dict[str, Any] = {
            "base": self._world.fingerprint,
            "catalogue": catalogue.model_dump(mode="json"),
            "seed": recipe.seed,
            "versions": library_versions("torch", "transformers", "peft", "trl"),
        }

    def steps(self) -> Iterator[Step]:
        """Yield all steps."""
        for name, step in self._recipe.steps.items():
            match step:
                case RolloutsStep():
                    prompts = self._file(step.prompts, name, "prompts")
                    work = Sample(self._world, step, prompts)
                    yield self._step(name, name, (), work, {"prompts": digest_file(prompts)})
                case LabelStep():
                    yield from self._labellings(name, step)
                case PairsStep():
                    yield from self._pairings(name, step)
                case TrainStep():
                    yield from self._trainings(name, step)
                case MergeStep():
                    yield from self._merges(name, step)
                case AnswersStep():
                    yield self._answers(name, step)
                case ReportStep():
                    yield self._report(name, step)
                case _:
                    assert_never(step)

    @property
    def _combinations(self) -> list[tuple[str, ...]]:
        return self._recipe.combinations(self._world.catalogue)

    def _targets(self, name: str) -> list[Target]:
        return targets_of(name, self._recipe, self._world.catalogue)

    def _labellings(self, name: str, step: LabelStep) -> Iterator[Step]:
        judge = None if step.judge is None else self._file(step.judge, name, "judge")
        files = {} if judge is None else {"judge": digest_file(judge)}
        cache = None if judge is None else reply_cache_file()
        for target in self._targets(name):
            label = Label(self._world, step, target, judge, cache)
            own = {"side": target.name, "sides": list(target.sides), **files}
            yield self._step(name, f"{name}-{target.name}", (step.rollouts,), label, own)

    def _merges(self, name: str, step: MergeStep) -> Iterator[Step]:
        self._check_targets(name, "experts", step.experts, ("side",))
        for combination in self._combinations:
            needs = tuple(f"{step.experts}-{side}" for side in combination)
            merge = Merge(step, combination)
            own = {"sides": list(combination)}
            yield self._step(name, f"{name}-{combination_name(combination)}", needs, merge, own)

    def _pairings(self, name: str, step: PairsStep) -> Iterator[Step]:
        labelled = self._targets(step.labels)
        if step.conditioned:
            needs = {f"{step.labels}-{target.name}": target for target in labelled}
            pair = Pair(self._world, step, needs)
            yield self._step(name, f"{name}-{name}", tuple(needs), pair, {})
            return
        for target in labelled:
            labels = f"{step.labels}-{target.name}"
            pair = Pair(self._world, step, {labels: target})
            yield self._step(name, f"{name}-{target.name}", (labels,), pair, {"side": target.name})

    def _trainings(self, name: str, step: TrainStep) -> Iterator[Step]:
        recipe = self._file(step.recipe, name, "recipe")
        files = {"recipe": digest_file(recipe)}
        for target in self._targets(name):
            own = {"side": target.name, **files}
            if step.prompts is not None:
                prompts = self._file(step.prompts, name, "prompts")
                train = Train(self._world, step, target.name, prompts, recipe)
                yield self._step(name, f"{name}-{target.name}", (), train, {**own, "prompts": digest_file(prompts)})
            else:
                pairs = f"{step.pairs}-{target.name}"
                train = Train(self._world, step, target.name, pairs, recipe)
                yield self._step(name, f"{name}-{target.name}", (pairs,), train, own)

    def _answers(self, name: str, step: AnswersStep) -> Step:
        prompts = self._file(step.prompts, name, "prompts")
        soups = {sides: combination_name(sides) for sides in self._combinations}
        models: dict[tuple[str, ...], str] = {}
        needs: list[str] = []
        if step.experts is not None:
            self._check_targets(name, "experts", step.experts, ("side",))
            needs = [f"{step.experts}-{target.name}" for target in self._targets(step.experts)]
        elif step.soups is not None:
            models, needs = soups, [f"{step.soups}-{soup}" for soup in soups.values()]
        elif step.policies is not None:
            self._check_targets(name, "policies", step.policies, ("combination", "single"))
            policies = [target.name for target in self._targets(step.policies)]
            models = dict.fromkeys(soups, policies[0]) if len(policies) == 1 else soups
            needs = [f"{step.policies}-{policy}" for policy in policies]
        work = Answer(self._world, step, prompts, tuple(self._combinations), models)
        return self._step(name, name, tuple(needs), work, {"prompts": digest_file(prompts)})

    def _report(self, name: str, step: ReportStep) -> Step:
        catalogue = self._world.catalogue
        if step.judges and set(step.judges) != set(catalogue.dimensions):
            raise DeclarationError(
                f"there are judges for {', '.join(step.judges)}, but the dimensions are "
                f"{', '.join(catalogue.dimensions)}",
                where=self._recipe.place("steps", name, "judges"),
                mend="give a judge for each dimension, or none",
            )
        trainings = {system: self._trained_for(system) for system in step.systems}
        needs = list(step.systems)
        for trained, targets in trainings.values():
            needs += [each for target in targets if (each := f"{trained}-{target.name}") not in needs]
        work = ReportOn(self._world, step, tuple(self._combinations), trainings)
        return self._step(name, name, tuple(needs), work, {})

    def _trained_for(self, system: str) -> tuple[str, list[Target]]:
        """Return the train step of a system and its targets. The base has none."""
        step: Any = self._recipe.steps[system]
        merged: Any = None if step.soups is None else self._recipe.steps[step.soups]
        trained = merged.experts if merged is not None else step.experts or step.policies
        return ("", []) if trained is None else (trained, self._targets(trained))

    def _check_targets(self, name: str, key: str, trained: str, kinds: tuple[str, ...]) -> None:
        """Check that the models of a train step, which another step names in `key`, are for targets of these kinds."""
        declared = self._recipe.steps[trained]
        if isinstance(declared, TrainStep) and declared.method == "reward":
            raise DeclarationError(
                f"`{key}` names the step {trained!r}, which trains reward models, and these give no answers",
                where=self._recipe.place("steps", name, key),
                mend="name a train step of another method",
            )
        kind = self._targets(trained)[0].kind
        if kind not in kinds:
            raise DeclarationError(
                f"`{key}` names the step {trained!r}, whose models are for {_MODELS[kind]}",
                where=self._recipe.place("steps", name, key),
                mend=f"name a train step whose models are for {' or '.join(_MODELS[each] for each in kinds)}: "
                "see `targets` of its labels",
            )

    def _step(self, declared: str, name: str, needs: tuple[str, ...], work: Any, own: dict[str, Any]) -> Step:
        settings = {**self._common, **self._recipe.steps[declared].model_dump(mode="json"), **own}
        return Step(
            name,
            settings,
            needs,
            work,
            where=self._recipe.place("steps", declared),
            is_result=declared in self._results,
        )

    def _file(self, path: str, name: str, key: str) -> Path:
        found = self._recipe.relative_path(path)
        if not found.is_file():
            raise InputError(
                f"there is no file {str(found)!r}",
                where=self._recipe.place("steps", name, key),
                mend="check the path; a relative path starts at the folder of the recipe",
            )
        return found.resolve()
