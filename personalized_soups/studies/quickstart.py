"""Run the whole pipeline: make pairs from the base's own answers, train experts, merge them, and score the answers.

Method and weights are chosen on validation topics, and scores are computed on held-out topics. Experts are not trained
on either.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from personalized_soups.declare.profile import MethodName, Profile
from personalized_soups.errors import RunError
from personalized_soups.evaluation.results import Examples, Results, ValidationScores
from personalized_soups.evaluation.scores import Graded, grade
from personalized_soups.studies.folder import StudyFolder, write_text
from personalized_soups.studies.outcome import (
    HeldOut,
    best_of_method,
    best_weight,
    collect,
    example_answers,
    score_selection,
)
from personalized_soups.studies.study import Combination, Stage, Study, TrainingBar
from personalized_soups.studies.workers import AnswerJob, Workers, start_workers
from personalized_soups.training.parallel import ExpertJob, train_experts


def run_study(study: Study, out: Path, *, stage: Stage, overwrite: bool = False) -> tuple[Results, Examples]:
    """Run every stage of a study whose files do not exist yet, and return the results and example answers.

    Args:
        study: the settings.
        out: the study's folder. It gets pairs, experts, merged adapters, all answers, results.json and examples.json.
        stage: opens a progress bar for each stage.
        overwrite: delete the files of a study in `out` and start again.

    Raises:
        OutputExistsError: if `out` holds other files, or a study with other settings.
        SoupError: if a stage fails.
    """
    folder = StudyFolder(out)
    if overwrite and folder.settings.is_file():
        folder.clear()
    folder.begin(study.settings())
    run = _Run(study, folder, stage)
    if not folder.results.is_file():
        with start_workers(study.num_workers) as workers:
            run.all_stages(workers)
    results: Results = json.loads(folder.results.read_text(encoding="utf-8"))
    examples: Examples = json.loads(folder.examples.read_text(encoding="utf-8"))
    return results, examples


def train_study(study: Study, out: Path, *, stage: Stage) -> Path:
    """Make the pairs and train the experts of a study, and return the folder of the experts. Existing files are kept.

    Raises:
        OutputExistsError: if `out` holds other files, or a study with other settings.
        SoupError: if a stage fails.
    """
    folder = StudyFolder(out)
    folder.begin(study.settings())
    run = _Run(study, folder, stage)
    with start_workers(study.num_workers) as workers:
        run.pairs(workers)
    run.train()
    return folder.experts


@dataclass(frozen=True, slots=True)
class _Run:
    """The stages of a study. Each stage skips work whose files exist.

    Attributes:
        study: the settings.
        folder: the paths of all files.
        stage: opens a progress bar.
    """

    study: Study
    folder: StudyFolder
    stage: Stage

    def all_stages(self, workers: Workers) -> None:
        self.pairs(workers)
        self.train()
        weights, selection = self.choose(workers)
        self.merge(weights)
        held_out, sweeps = self.evaluate(workers, weights)
        best = best_of_method(selection)
        results = collect(
            study_sides=self.study.sides,
            combinations=self.study.combinations,
            weights=weights,
            selection=selection,
            held_out=held_out,
            sweeps=sweeps,
            best_method=best,
            seed=self.study.seed,
            basis=self.study.basis,
            seconds=self._seconds(),
        )
        examples = example_answers(held_out, best, self.study.combinations)
        write_text(self.folder.examples, json.dumps(examples, indent=2, ensure_ascii=False) + "\n")
        write_text(self.folder.results, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def pairs(self, workers: Workers) -> None:
        """Sample the base's answers once, and make pairs for every side from them."""
        from personalized_soups.training.data import write_pairs
        from personalized_soups.training.pairs import Sampled, label_pool, read_pool, write_pool

        study, recipe = self.study, self.study.recipe.pairs
        with self._timed("pairs"):
            if not self.folder.pool.is_file():
                prompts = study.prompts("seen", recipe.num_prompts)
                jobs = [
                    self._job(
                        f"sample-{turn}", None, prompts, seed=1000 * study.seed + turn, temperature=recipe.temperature
                    )
                    for turn in range(recipe.num_samples)
                ]
                answers = self._answered("sampling answers of the base", "pool", jobs, workers)
                pool = [
                    Sampled(prompt, tuple(answers[job.name][at] for job in jobs)) for at, prompt in enumerate(prompts)
                ]
                write_pool(self.folder.pool, pool)
            pool = read_pool(self.folder.pool)
            for side in study.catalogue.sides:
                if not self.folder.pairs(side).is_file():
                    labelled = label_pool(
                        pool,
                        side,
                        study.catalogue,
                        min_gap=recipe.min_gap,
                        max_pairs=recipe.max_pairs,
                        seed=study.seed,
                        conversational=True,
                    )
                    self.folder.pairs(side).parent.mkdir(parents=True, exist_ok=True)
                    write_pairs(self.folder.pairs(side), labelled)

    def train(self) -> None:
        """Train one expert for each side."""
        study, recipe = self.study, self.study.training_recipe
        jobs = [ExpertJob(side, self.folder.pairs(side), self.folder.experts / side) for side in study.catalogue.sides]
        with self._timed("train"), self.stage(f"training {len(jobs)} experts", None) as bar:
            train_experts(
                jobs,
                base=study.base,
                recipe=recipe,
                catalogue=study.catalogue,
                device=study.device,
                seed=study.seed,
                resume=True,
                workers=study.num_workers,
                progress=TrainingBar(bar, len(jobs)),
            )

    def choose(self, workers: Workers) -> tuple[dict[MethodName, float], list[ValidationScores]]:
        """Score all weights of all methods on validation topics. Return each method's best weight and all scores."""
        study, recipe = self.study, self.study.recipe.selection
        prompts = study.prompts("validation", recipe.num_prompts)
        trials = [(method, weight) for method, weights in recipe.weights.items() for weight in weights]
        jobs = {
            (method, weight, sides): self._job(
                f"{method} {weight:g} {'+'.join(sides)}",
                Profile(method=method, weights=dict.fromkeys(sides, weight)),
                prompts,
                seed=2000 + study.seed,
            )
            for method, weight in trials
            for sides in study.combinations
        }
        with self._timed("choose"):
            title = "choosing method and scale on validation topics"
            answers = self._answered(title, "validation", list(jobs.values()), workers)
            graded = {key: self._graded(prompts, answers[job.name]) for key, job in jobs.items()}
        selection = [
            score_selection(method, weight, {sides: graded[method, weight, sides] for sides in study.combinations})
            for method, weight in trials
        ]
        return {method: best_weight(selection, method) for method in recipe.weights}, selection

    def merge(self, weights: Mapping[MethodName, float]) -> None:
        """Merge an adapter for each combination of sides with each method at its best weight."""
        from personalized_soups.adapters.library import ExpertLibrary
        from personalized_soups.merging.writing.adapter import merge

        library = ExpertLibrary.open(self.folder.experts)
        wanted = [(method, sides) for method in weights for sides in self.study.combinations]
        with self._timed("merge"), self.stage("merging personal models", len(wanted)) as bar:
            for done, (method, sides) in enumerate(wanted, start=1):
                target = self.folder.soup(method, sides)
                if not target.is_dir():
                    profile = Profile(
                        user="+".join(sides), method=method, weights=dict.fromkeys(sides, weights[method])
                    )
                    merge(library, profile).write(target)
                bar.update(done)

    def evaluate(
        self, workers: Workers, weights: Mapping[MethodName, float]
    ) -> tuple[HeldOut, dict[str, list[tuple[float, list[Graded]]]]]:
        """Answer held-out prompts with the base and every merged model, and with every step of the sweeps."""
        study, recipe = self.study, self.study.recipe
        prompts = study.prompts("held-out", recipe.num_prompts)
        jobs: dict[tuple[str, Combination], AnswerJob] = {
            ("base", ()): self._job("base", None, prompts, seed=3000 + study.seed)
        } | {
            (method, sides): self._job(
                f"{method} {'+'.join(sides)}", self.folder.soup(method, sides), prompts, seed=3000 + study.seed
            )
            for method in weights
            for sides in study.combinations
        }
        swept = prompts[: recipe.sweep.num_prompts]
        shares = [step / (recipe.sweep.num_steps - 1) for step in range(recipe.sweep.num_steps)]
        sweep_jobs = {
            (name, share): self._job(
                f"{name} {share:.3f}",
                Profile(weights={high: share, low: 1 - share}, allow_opposed=True),
                swept,
                seed=3000 + study.seed,
            )
            for name, (low, high) in study.sides.items()
            for share in shares
        }
        with self._timed("evaluate"):
            answers = self._answered("answering held-out prompts", "held-out", list(jobs.values()), workers)
            sweep_answers = self._answered("sweeping weights", "sweeps", list(sweep_jobs.values()), workers)
            held_out: HeldOut = {key: self._graded(prompts, answers[job.name]) for key, job in jobs.items()}
            sweeps = {
                name: [(share, self._graded(swept, sweep_answers[sweep_jobs[name, share].name])) for share in shares]
                for name in study.sides
            }
        return held_out, sweeps

    def _graded(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Graded]:
        return grade(prompts, answers, self.study.catalogue, list(self.study.catalogue.sides))

    def _job(
        self,
        name: str,
        soup: Path | Profile | None,
        prompts: tuple[str, ...],
        *,
        seed: int,
        temperature: float | None = None,
    ) -> AnswerJob:
        recipe = self.study.recipe
        return AnswerJob(
            name=name,
            base=str(self.study.base),
            soup=soup,
            experts=self.folder.experts,
            prompts=prompts,
            temperature=temperature or recipe.temperature,
            max_new_tokens=recipe.max_new_tokens,
            seed=seed,
            device=self.study.device,
        )

    def _answered(self, title: str, stage: str, jobs: Sequence[AnswerJob], workers: Workers) -> dict[str, list[str]]:
        """Return the answers of each job. Stored answers are read, and the others are computed and stored."""
        file = self.folder.answers(stage)
        by_job = {name: answers for name, answers in file.read().items() if name in {job.name for job in jobs}}
        with self.stage(title, len(jobs)) as bar:
            bar.update(len(by_job))
            for job, answers in workers.run([job for job in jobs if job.name not in by_job]):
                file.add(job.name, answers)
                by_job[job.name] = answers
                bar.update(len(by_job))
        return by_job

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the block's run time to the seconds that the stage took in earlier, interrupted runs."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = self._seconds()
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
            write_text(self.folder.seconds, json.dumps(seconds, indent=2) + "\n")

    def _seconds(self) -> dict[str, float]:
        path = self.folder.seconds
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise RunError("the file is not JSON", where=str(path), mend="delete the file and run again") from None
