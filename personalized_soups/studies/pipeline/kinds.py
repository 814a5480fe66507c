"""The work of each kind of step: sample, label, pair, train and merge."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.declare.loader import load
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.run_steps import LabelStep, MergeStep, PairsStep, RolloutsStep, TrainStep
from personalized_soups.declare.training import GrpoRecipe, OneLossRecipe, RewardRecipe, SftRecipe, TrainingRecipe
from personalized_soups.studies.pipeline.prompts import prompts_of
from personalized_soups.studies.pipeline.steps import Report
from personalized_soups.studies.pipeline.targets import Target
from personalized_soups.studies.pipeline.world import World
from personalized_soups.training.progress import Silent, StepReport

ROLLOUTS, _LABELS, _PAIRS = "rollouts.jsonl", "labels.jsonl", "pairs.jsonl"


# The recipe of each training method.
RECIPES: Mapping[str, type[TrainingRecipe | OneLossRecipe]] = {
    "dpo": TrainingRecipe,
    "sft": SftRecipe,
    "reward": RewardRecipe,
    "grpo": GrpoRecipe,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Samples answers to the prompts of a file."""

    world: World
    step: RolloutsStep
    prompts: Path

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write rollouts.jsonl."""
        from personalized_soups.training.instructions import InstructedShare, instructions_of
        from personalized_soups.training.resumable_sampling import sample_kept
        from personalized_soups.training.rollouts import write_pool

        step, prompts = self.step, prompts_of(self.prompts, self.step)
        total = len(prompts) * step.num_samples
        pool = sample_kept(
            self.world.generator(),
            prompts,
            kept=work / ".sampling.jsonl",
            base=self.world.fingerprint,
            num_samples=step.num_samples,
            temperature=step.temperature,
            max_new_tokens=step.max_new_tokens,
            batch_size=step.batch_size,
            seed=self.world.seed,
            instructed=InstructedShare(step.instructed, instructions_of(self.world.catalogue)),
            on_done=lambda done: report(f"{done}/{total} answers"),
        )
        write_pool(work / ROLLOUTS, pool)
        (work / ".sampling.jsonl").unlink()


@dataclass(frozen=True, slots=True)
class Label:
    """Labels answers for one target."""

    world: World
    step: LabelStep
    target: Target
    judge: Path | None
    cache: Path | None

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write labels.jsonl."""
        from contextlib import ExitStack

        from personalized_soups.scoring.judging.open_judge import open_judge
        from personalized_soups.training.labelling import LabelRequest

        with ExitStack() as stack:
            judge = None
            if self.judge is not None:
                judge = stack.enter_context(open_judge(self.judge, cache=self.cache, device=self.world.device))
            rollouts = inputs[self.step.rollouts] / ROLLOUTS
            step, world = self.step, self.world
            request = LabelRequest(
                rollouts,
                self.target.name,
                world.catalogue,
                judge,
                step.num_comparisons,
                step.whole_sentences,
                world.seed,
                weights=self.target.weights,
            )
            total = request.num_prompts()
            request.write(work / _LABELS, overwrite=True, on_done=lambda done: report(f"{done}/{total} prompts"))


@dataclass(frozen=True, slots=True)
class Pair:
    """Chooses the pairs of one target, or of all targets together if the prompts say what is preferred.

    Attributes:
        labels: the target of each labels step.
    """

    world: World
    step: PairsStep
    labels: Mapping[str, Target]

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write pairs.jsonl."""
        from personalized_soups.generation.loading import load_tokenizer
        from personalized_soups.generation.prompts import with_text_before
        from personalized_soups.training.data import write_pairs
        from personalized_soups.training.labels import read_labels
        from personalized_soups.training.pairs import choose_pairs

        step, catalogue = self.step, self.world.catalogue
        conversational = load_tokenizer(self.world.base).chat_template is not None
        pairs = []
        for name, target in self.labels.items():
            labels = read_labels(inputs[name] / _LABELS)
            if step.conditioned:
                text = catalogue.instructions(target.sides)
                labels = [label.replaced(prompt=with_text_before(label.prompt, text)) for label in labels]
            pairs += choose_pairs(
                labels,
                min_gap=step.min_gap,
                max_pairs=step.max_pairs,
                seed=self.world.seed,
                conversational=conversational,
                match_length=step.match_length and not any(map(catalogue.is_about_length, target.sides)),
            )
        write_pairs(work / _PAIRS, pairs)
        report(f"{len(pairs)} pairs")


@dataclass(frozen=True, slots=True)
class Train:
    """Trains the expert, the policy or the reward model of one target, in a folder with the target's name."""

    world: World
    step: TrainStep
    target: Target
    data: str | Path
    recipe: Path

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write the folder of the target."""
        world, name = self.world, self.target.name
        options: dict[str, Any] = {
            "base": world.base,
            "out": work / name,
            "device": world.device,
            "seed": world.seed,
            "resume": True,
            "progress": _Reporting(report),
        }
        if self.step.method != "reward":
            options["on"] = world.on
        if self.step.method == "grpo":
            from personalized_soups.training.grpo import train_policy

            total = sum(self.target.weights.values())
            rewards = {side: weight / total for side, weight in self.target.weights.items()}
            recipe = load(self.recipe, GrpoRecipe)
            train_policy(
                name, prompts=Path(self.data), recipe=recipe, rewards=rewards, catalogue=world.catalogue, **options
            )
            return
        # A policy is not for one side, so no dimension of it can be recorded.
        options["catalogue"] = world.catalogue if name in world.catalogue.sides else None
        pairs = inputs[str(self.data)] / _PAIRS
        if self.step.method == "reward":
            from personalized_soups.training.reward import train_reward_model

            train_reward_model(name, data=pairs, recipe=load(self.recipe, RewardRecipe), **options)
            return
        if self.step.method == "sft":
            from personalized_soups.training.sft import train_on_completions

            train_on_completions(name, data=pairs, recipe=load(self.recipe, SftRecipe), **options)
            return
        from personalized_soups.training.expert import train_expert

        train_expert(name, data=pairs, recipe=load(self.recipe, TrainingRecipe), **options)


@dataclass(frozen=True, slots=True)
class TakeExpert:
    """Copies an expert that was trained before, in a folder with the expert's name."""

    folder: Path
    name: str

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write the folder of the expert."""
        shutil.copytree(self.folder, work / self.name, dirs_exist_ok=True)


@dataclass(frozen=True, slots=True)
class Merge:
    """Merges the experts of one combination, in a folder with the combination's name."""

    step: MergeStep
    sides: tuple[str, ...]

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write the merged adapter."""
        from personalized_soups.adapters.library import ExpertLibrary
        from personalized_soups.merging.writing.adapter import merge

        library = ExpertLibrary.open(*inputs.values())
        name = "+".join(self.sides)
        weights = dict.fromkeys(self.sides, self.step.weight)
        profile = Profile(user=name, method=self.step.method, weights=weights)
        merge(library, profile).write(work / name, overwrite=True)


class _Reporting(Silent):
    def __init__(self, report: Report) -> None:
        self._report = report

    def advance(self, side: str, report: StepReport) -> None:
        """Report a step as text."""
        figures = "".join(f"  {name} {value:.3g}" for name, value in report.figures.items())
        self._report(f"step {report.step}/{report.num_steps}  loss {report.loss:.3g}{figures}")
