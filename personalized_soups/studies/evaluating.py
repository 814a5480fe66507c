"""Answer prompts with every system of a study, and grade the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalized_soups.declare.profile import Profile
from personalized_soups.evaluation.comparison import BASE, SINGLE_EXPERT
from personalized_soups.evaluation.grading import Grader
from personalized_soups.evaluation.scores import Graded
from personalized_soups.generation.prompts import with_text_before
from personalized_soups.studies.answering import Answering
from personalized_soups.studies.choosing import Choice
from personalized_soups.studies.study import Combination
from personalized_soups.studies.workers import AnswerJob

System = tuple[str, Combination]

PREFERENCE_PROMPTING, SOUP_PROMPTING = "preference_prompting", "soup_prompting"


@dataclass(frozen=True, slots=True)
class Evaluating:
    """Evaluates all systems of a study on some prompts.

    Attributes:
        answering: answers the prompts.
        grader: grades the answers.
        choice: what was chosen on validation prompts.
    """

    answering: Answering
    grader: Grader
    choice: Choice

    def graded(self, title: str, stage: str, prompts: Sequence[str]) -> dict[System, list[Graded]]:
        """Return the graded answers of every system for every combination, in the order of the report.

        The key of the base is `("base", ())`. All systems answer a prompt with the same random numbers.
        """
        jobs = self._jobs(prompts)
        by_name = {job.name: job for job in jobs.values()}  # combinations may share a single expert
        answers = self.answering.answered(title, stage, list(by_name.values()))
        graded = {name: self.grader.graded(prompts, answers[name]) for name in by_name}
        return {system: graded[job.name] for system, job in jobs.items()}

    def swept(self) -> dict[str, list[tuple[float, list[Graded]]]]:
        """Return, for each dimension, the weight and the graded answers of each step of its sweep."""
        study, recipe = self.answering.study, self.answering.study.recipe.sweep
        if recipe is None:
            return {}
        prompts = study.test_prompts[: recipe.num_prompts]
        shares = [step / (recipe.num_steps - 1) for step in range(recipe.num_steps)]
        jobs = {
            (name, share): self._job(
                f"{name} {share:.3f}", Profile(weights={high: share, low: 1 - share}, allow_opposed=True), prompts
            )
            for name, (low, high) in study.sides.items()
            for share in shares
        }
        answers = self.answering.answered("sweeping weights", "sweeps", list(jobs.values()))
        return {
            name: [(share, self.grader.graded(prompts, answers[jobs[name, share].name])) for share in shares]
            for name in study.sides
        }

    def _jobs(self, prompts: Sequence[str]) -> dict[System, AnswerJob]:
        study, choice = self.answering.study, self.choice
        wanted = study.recipe.systems
        jobs: dict[System, AnswerJob] = {(BASE, ()): self._job(BASE, None, prompts)}
        if PREFERENCE_PROMPTING in wanted:
            for sides in study.combinations:
                jobs[PREFERENCE_PROMPTING, sides] = self._prompted(PREFERENCE_PROMPTING, sides, None, prompts)
        if SINGLE_EXPERT in wanted:
            for sides in study.combinations:
                expert = choice.single_experts[sides]
                jobs[SINGLE_EXPERT, sides] = self._job(f"single {expert}", Profile(weights={expert: 1.0}), prompts)
        for method in choice.weights:
            for sides in study.combinations:
                jobs[method, sides] = self._job(f"{method} {'+'.join(sides)}", self._soup(method, sides), prompts)
        if SOUP_PROMPTING in wanted:
            for sides in study.combinations:
                soup = self._soup(choice.best_method, sides)
                jobs[SOUP_PROMPTING, sides] = self._prompted(SOUP_PROMPTING, sides, soup, prompts)
        return jobs

    def _soup(self, method: str, sides: Combination) -> Path | Profile:
        """Return the merged adapter. In mixed batches, a linear soup needs no adapter, because its mixture is exact."""
        if method == "linear" and self.answering.study.recipe.batch_size is not None:
            return Profile(method=method, weights=dict.fromkeys(sides, self.choice.weights[method]))
        return self.answering.folder.soup(method, sides)

    def _prompted(
        self, system: str, sides: Combination, soup: Path | Profile | None, prompts: Sequence[str]
    ) -> AnswerJob:
        """Return the job of a system that answers each prompt with the sides' instructions before it."""
        text = self.answering.study.catalogue.instructions(sides)
        instructed = [str(with_text_before(prompt, text)) for prompt in prompts]
        return self._job(f"{system} {'+'.join(sides)}", soup, prompts, asked=instructed)

    def _job(
        self,
        name: str,
        soup: Path | Profile | None,
        prompts: Sequence[str],
        *,
        asked: Sequence[str] | None = None,
    ) -> AnswerJob:
        """Return a job that answers `asked`, by default the prompts. Answers are measured as answers to the prompts."""
        seed = 3000 + self.answering.study.seed
        return self.answering.job(name, soup, asked or prompts, seed=seed, measured_as=prompts)
