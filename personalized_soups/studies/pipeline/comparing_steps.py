"""The steps that answer prompts with models, and the report on their answers, from the steps that a recipe declares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, assert_never

from personalized_soups.declare.run_steps import (
    AnswersStep,
    ChooseStep,
    InterferenceStep,
    ReportStep,
    RolloutsStep,
    SweepStep,
    TrainStep,
)
from personalized_soups.errors import DeclarationError
from personalized_soups.files.digest import digest_file
from personalized_soups.studies.pipeline.answering import Answer
from personalized_soups.studies.pipeline.choosing import Choose
from personalized_soups.studies.pipeline.expansion import Expansion, seed_prefix
from personalized_soups.studies.pipeline.mixing import Mixing
from personalized_soups.studies.pipeline.prompts import prompts_of
from personalized_soups.studies.pipeline.reporting import LEAST_ANSWERS, ReportOn
from personalized_soups.studies.pipeline.steps import Step
from personalized_soups.studies.pipeline.sweeping import MeasureInterference, SweepSides
from personalized_soups.studies.pipeline.targets import Target, beta_of, checked_combinations, combination_name

Generating: TypeAlias = ChooseStep | AnswersStep | SweepStep | InterferenceStep

# The targets of models that are mixed for a user.
_MIXED = ("side", "dimension")


def generation_steps(run: Expansion, name: str, step: Generating) -> Iterator[Step]:
    """Return the step that generates answers.

    Raises:
        DeclarationError: if the models that it names are for other targets.
    """
    prompts = run.file(step.prompts, name, "prompts")
    needs = _experts_of(run, step)
    mixing = None
    if step.experts is not None:
        kinds = ("side",) if isinstance(step, InterferenceStep) or _mixes_tokens(step) else _MIXED
        run.check_targets(name, "experts", step.experts, kinds)
        mixing = _mixing(run, step)
        _check_choice(run, name, step, mixing)
        tried = list(step.weights) if isinstance(step, ChooseStep) else [mixing.method or "linear"]
        if any(method != "linear" for method in tried):
            run.check_can_merge(name, "weights" if isinstance(step, ChooseStep) else "method")
    combinations = _answered(run, step)
    work: Choose | SweepSides | MeasureInterference | Answer
    match step:
        case ChooseStep():
            assert mixing is not None
            work = Choose(run.world, step, prompts, combinations, mixing)
        case SweepStep():
            assert mixing is not None
            work = SweepSides(run.world, step, prompts, combinations, mixing)
        case InterferenceStep():
            assert mixing is not None
            work = MeasureInterference(run.world, step, prompts, mixing)
        case AnswersStep():
            models, more = _models(run, name, step)
            needs += more
            work = Answer(run.world, step, prompts, combinations, models, mixing)
        case _:
            assert_never(step)
    own: dict[str, Any] = {
        "prompts": digest_file(prompts),
        "combinations": [list(sides) for sides in combinations],
        "beta": None if mixing is None else mixing.beta,
    }
    if isinstance(step, ChooseStep) or (isinstance(step, AnswersStep) and step.num_candidates > 1):
        own["scorers"] = run.scorer_files
    yield run.step(name, name, tuple(needs), work, own, extent=work.extent)


def _answered(run: Expansion, step: Generating) -> tuple[tuple[str, ...], ...]:
    """Return the combinations that a step answers for: all, or those for which there are policies."""
    if isinstance(step, AnswersStep) and step.policies is not None:
        targets = run.targets(step.policies)
        if targets[0].kind == "combination":
            return tuple(target.sides for target in targets)
    return tuple(run.combinations)


def _experts_of(run: Expansion, step: Any) -> list[str]:
    """Return the steps whose experts a step mixes, and the one that chose their weight."""
    if step.experts is None:
        return []
    choice = getattr(step, "choice", None)
    return [f"{step.experts}-{target.name}" for target in run.targets(step.experts)] + ([choice] if choice else [])


def _mixes_tokens(step: Any) -> bool:
    return getattr(step, "mixing", "weights") == "log_probs"


def _mixing(run: Expansion, step: Any) -> Mixing:
    is_backbone = run.targets(step.experts)[0].kind == "dimension"
    choice = getattr(step, "choice", None)
    return Mixing(
        catalogue=run.world.catalogue,
        beta=beta_of(step.experts, run.recipe) if is_backbone else None,
        weight=getattr(step, "weight", None),
        choice=choice,
        method=_method(step),
    )


def _method(step: Any) -> str | None:
    """Return the merge method, or None for the chosen one. Only answers can be those of another method than linear."""
    if not isinstance(step, AnswersStep) or _mixes_tokens(step):
        return "linear"
    return step.method or (None if step.choice else "linear")


def _check_choice(run: Expansion, name: str, step: Generating, mixing: Mixing) -> None:
    """Check that the choose step has chosen for these experts, and has tried the method.

    Raises:
        DeclarationError: if it has not.
    """
    if mixing.choice is None:
        return
    choose = run.recipe.steps[mixing.choice]
    assert isinstance(choose, ChooseStep)
    where = run.recipe.place("steps", name, "choice")
    if choose.experts != step.experts:
        raise DeclarationError(
            f"the step {mixing.choice!r} chooses a weight for the experts of {choose.experts!r}, but these are of "
            f"{step.experts!r}",
            where=where,
            mend="name a choose step with the same `experts:`",
        )
    if mixing.method is not None and mixing.method not in choose.weights:
        raise DeclarationError(
            f"the step {mixing.choice!r} tries no weights for the method {mixing.method}",
            where=where,
            mend=f"add weights of {mixing.method} to it, or write `weight:`",
        )


def _models(run: Expansion, name: str, step: AnswersStep) -> tuple[dict[tuple[str, ...], str], list[str]]:
    """Return the name of the model for each combination, and the steps that make these models."""
    soups = {sides: combination_name(sides) for sides in _answered(run, step)}
    if step.soups is not None:
        return soups, [f"{step.soups}-{soup}" for soup in soups.values()]
    if step.policies is None:
        return {}, []
    run.check_targets(name, "policies", step.policies, ("combination", "single"))
    policies = [target.name for target in run.targets(step.policies)]
    models = dict.fromkeys(soups, policies[0]) if len(policies) == 1 else soups
    return models, [f"{step.policies}-{policy}" for policy in policies]


def report_steps(run: Expansion, name: str, step: ReportStep) -> Iterator[Step]:
    """Return the report, which belongs to the first seed and reads the steps of all seeds.

    Raises:
        DeclarationError: if the judges do not suit the catalogue, or a front is not one of the systems.
    """
    if run.number:
        return
    catalogue = run.world.catalogue
    if step.judges and set(step.judges) != set(catalogue.dimensions):
        raise DeclarationError(
            f"there are judges for {', '.join(step.judges)}, but the dimensions are {', '.join(catalogue.dimensions)}",
            where=run.recipe.place("steps", name, "judges"),
            mend="give a judge for each dimension, or none",
        )
    _check_same_prompts(run, name, step)
    _check_fluency(run, name, step)
    trainings = {system: _trained_for(run, system) for system in step.systems}
    needs = list(step.systems)
    for trained, targets in trainings.values():
        needs += [f"{trained}-{target.name}" for target in targets if trained]
    needs += [more for more in (step.fluency, *step.fronts) if more is not None]
    if step.reward_models is not None:
        _check_judges(run, name, step, step.reward_models)
        needs += [f"{step.reward_models}-{side}" for side in catalogue.sides]
    choices = {
        system: choice for system in step.systems if (choice := getattr(run.recipe.steps[system], "choice", None))
    }
    needs += choices.values()
    for front in step.fronts:
        if isinstance(run.recipe.steps[front], AnswersStep) and front not in step.systems:
            raise DeclarationError(
                f"`fronts` names {front!r}, which is not in `systems`",
                where=run.recipe.place("steps", name, "fronts"),
                mend="add it to `systems`",
            )
    sweeps = tuple(front for front in step.fronts if isinstance(run.recipe.steps[front], SweepStep))
    prefixes = tuple(seed_prefix(number) for number in range(run.recipe.num_seeds))
    work = ReportOn(run.world, step, _reported(run, name, step), trainings, choices, sweeps, prefixes)
    every = dict.fromkeys(f"{prefix}{need}" for prefix in prefixes for need in needs)
    if step.interference is not None:
        every[step.interference] = None  # experts are checked with the first seed
    own = {
        "num_seeds": run.recipe.num_seeds,
        "combinations": [list(sides) for sides in work.combinations],
        "scorers": run.scorer_files,
        "judges": run.files_of_scorers(step.judges.values()),
    }
    yield run.step(name, name, tuple(every), work, own)


def _check_same_prompts(run: Expansion, name: str, step: ReportStep) -> None:
    """Check that all systems and fronts have answered the same prompts.

    Raises:
        DeclarationError: if they have not.
    """
    prompts: dict[str, list[str]] = {}
    for system in (*step.systems, *step.fronts):
        declared: Any = run.recipe.steps[system]
        prompts[system] = prompts_of(run.file(declared.prompts, system, "prompts"), declared)
    for system, own in prompts.items():
        if own != prompts[step.systems[0]]:
            raise DeclarationError(
                f"the step {system!r} answers other prompts than {step.systems[0]!r}",
                where=run.recipe.place("steps", name, "systems" if system in step.systems else "fronts"),
                mend="give all systems and fronts of a report the same prompts",
            )


def _check_fluency(run: Expansion, name: str, step: ReportStep) -> None:
    """Check that there are enough plain answers to calibrate the fluency gate.

    Raises:
        DeclarationError: if there are not.
    """
    if step.fluency is None:
        return
    pool = run.recipe.steps[step.fluency]
    assert isinstance(pool, RolloutsStep)
    prompts = prompts_of(run.file(pool.prompts, step.fluency, "prompts"), pool)
    number = len(prompts) * (pool.num_samples - pool.instructed)
    if number < LEAST_ANSWERS:
        raise DeclarationError(
            f"the step {step.fluency!r} samples {number} answers without instructions, but the fluency gate needs "
            f"{LEAST_ANSWERS}",
            where=run.recipe.place("steps", name, "fluency"),
            mend="sample more answers, or remove `fluency:`",
        )


def _reported(run: Expansion, name: str, step: ReportStep) -> tuple[tuple[str, ...], ...]:
    """Return the combinations of a report: those that every system has answered, or the declared ones among them.

    Raises:
        DeclarationError: if there is none, or a system has not answered a declared one.
    """
    answered = {system: _answered(run, run.recipe.steps[system]) for system in step.systems}  # type: ignore[arg-type]
    wanted = checked_combinations(step.combinations, name, run.recipe, run.world.catalogue) or run.combinations
    common = tuple(sides for sides in wanted if all(sides in each for each in answered.values()))
    if not common or (step.combinations and len(common) < len(wanted)):
        lacking = next(system for system, each in answered.items() if not set(wanted) <= set(each))
        raise DeclarationError(
            f"the system {lacking!r} has not answered for all combinations of the report",
            where=run.recipe.place("steps", name, "combinations"),
            mend="name combinations that it has policies for",
        )
    return common


def _check_judges(run: Expansion, name: str, step: ReportStep, trained: str) -> None:
    """Check that the judges are reward models of the sides, and that the first system is the base, their reference.

    Raises:
        DeclarationError: if not.
    """
    first: Any = run.recipe.steps[step.systems[0]]
    if (first.experts, first.soups, first.policies) != (None, None, None) or first.prompted or first.num_candidates > 1:
        raise DeclarationError(
            f"the first system, {step.systems[0]!r}, is not the base, whose answers are the reference of reward models",
            where=run.recipe.place("steps", name, "systems"),
            mend="list an answers step of the base first",
        )
    declared = run.recipe.steps[trained]
    if not isinstance(declared, TrainStep) or declared.method != "reward":
        raise DeclarationError(
            f"`reward_models` names the step {trained!r}, which trains no reward models",
            where=run.recipe.place("steps", name, "reward_models"),
            mend="name a train step with `method: reward`",
        )
    if run.targets(trained)[0].kind != "side":
        raise DeclarationError(
            f"`reward_models` names the step {trained!r}, whose models are not for one side each",
            where=run.recipe.place("steps", name, "reward_models"),
            mend="name a train step whose labels have `targets: sides`",
        )


def _trained_for(run: Expansion, system: str) -> tuple[str, list[Target]]:
    """Return the train step of a system and its targets. The base has none, nor have experts of before."""
    step: Any = run.recipe.steps[system]
    merged: Any = None if step.soups is None else run.recipe.steps[step.soups]
    trained = merged.experts if merged is not None else step.experts or step.policies
    if trained is None:
        return "", []
    is_trained = isinstance(run.recipe.steps[trained], TrainStep)
    return trained if is_trained else "", run.targets(trained)
