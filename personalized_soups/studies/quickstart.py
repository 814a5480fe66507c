"""Run the whole pipeline: make pairs from the base's own answers, train experts, merge them, and score the answers.

Method and weights are chosen on validation prompts, and scores are computed on test prompts. Experts are not trained on
either, and no subject is in two splits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from personalized_soups.declare.profile import Profile
from personalized_soups.evaluation.comparison import compare
from personalized_soups.evaluation.grading import Grader
from personalized_soups.evaluation.results import Comparison, Examples, ExternalComparison, Results
from personalized_soups.studies.answering import Answering
from personalized_soups.studies.base_checks import check_base, token_counter
from personalized_soups.studies.choosing import Choice, choice_in, choose
from personalized_soups.studies.costs import Costs
from personalized_soups.studies.evaluating import Evaluating
from personalized_soups.studies.external import ExternalPrompts, draw_external, read_external
from personalized_soups.studies.folder import StudyFolder, write_text
from personalized_soups.studies.gating import calibrated_gate
from personalized_soups.studies.judging import judge_reports, judges_of
from personalized_soups.studies.outcome import HeldOut, collect, example_answers
from personalized_soups.studies.pairing import Pairing
from personalized_soups.studies.samples import samples_page
from personalized_soups.studies.study import Stage, Study, TrainingBar
from personalized_soups.studies.workers import Workers, start_workers
from personalized_soups.training.parallel import ExpertJob, train_experts


def run_study(
    study: Study,
    out: Path,
    *,
    stage: Stage,
    overwrite: bool = False,
    external: Mapping[str, Path] | None = None,
) -> tuple[Results, Examples]:
    """Run every stage of a study whose files do not exist yet, and return the results and example answers.

    Args:
        study: the settings.
        out: the study's folder. It gets pairs, experts, merged adapters, all answers, results.json and examples.json.
        stage: opens a progress bar for each stage.
        overwrite: delete the files of a study in `out` and start again.
        external: files of other prompts by name, on which the comparison is repeated. Nothing is chosen on them.

    Raises:
        OutputExistsError: if `out` holds other files, or a study with other settings.
        SoupError: if a stage fails.
    """
    check_base(study)
    for path in (external or {}).values():
        read_external(path)  # a wrong file is found before an earlier run is deleted
    folder = StudyFolder(out)
    if overwrite and folder.settings.is_file():
        folder.clear()
    folder.begin(study.settings())
    drawn = {name: _drawn(study, folder, name, path) for name, path in (external or {}).items()}
    if not folder.results.is_file() or drawn.keys() - _results(folder).get("external", {}).keys():
        with start_workers(study.num_workers) as workers:
            run = _Run(study, folder, stage, workers)
            if not folder.results.is_file():
                run.all_stages()
            for name, prompts in drawn.items():
                run.external(name, prompts)
    examples: Examples = json.loads(folder.examples.read_text(encoding="utf-8"))
    return _results(folder), examples


def train_study(study: Study, out: Path, *, stage: Stage) -> Path:
    """Make the pairs and train the experts of a study, and return the folder of the experts. Existing files are kept.

    Raises:
        OutputExistsError: if `out` holds other files, or a study with other settings.
        SoupError: if a stage fails.
    """
    folder = StudyFolder(out)
    folder.begin(study.settings())
    with start_workers(study.num_workers) as workers:
        run = _Run(study, folder, stage, workers)
        run.pairs()
    run.train()
    return folder.experts


def _drawn(study: Study, folder: StudyFolder, name: str, path: Path) -> ExternalPrompts:
    return draw_external(
        path,
        study.recipe.external,
        num_tokens=token_counter(study.base),
        seed=study.seed,
        stored=folder.external(name),
    )


def _results(folder: StudyFolder) -> Results:
    results: Results = json.loads(folder.results.read_text(encoding="utf-8"))
    return results


class _Run:
    """The stages of a study. Each stage skips work whose files exist."""

    def __init__(self, study: Study, folder: StudyFolder, stage: Stage, workers: Workers) -> None:
        self._study = study
        self._folder = folder
        self._stage = stage
        self._workers = workers
        self._costs = Costs(folder)
        self._answering = Answering(study, folder, stage, workers, self._costs)

    def all_stages(self) -> None:
        """Run every stage, and write the results."""
        self.pairs()
        grader = self._grader()  # a gate or judge that cannot be made is found before the long training
        if self._study.recipe.batch_size is not None:
            self._workers.stop()  # they hold a model in memory, which the training needs; the next stage starts others
        self.train()
        with self._costs.stage("choose"):
            choice, selection = choose(self._answering, grader)
        self.merge(choice)
        evaluating = Evaluating(self._answering, grader, choice)
        with self._costs.stage("evaluate"):
            held_out = evaluating.graded("answering held-out prompts", "held-out", self._study.test_prompts)
            sweeps = evaluating.swept()
        results = collect(
            study_sides=self._study.sides,
            combinations=self._study.combinations,
            weights=choice.weights,
            selection=selection,
            held_out=held_out,
            sweeps=sweeps,
            best_method=choice.best_method,
            seed=self._study.seed,
            basis=self._study.basis,
            seconds=self._costs.seconds,
            memory=self._costs.memory,
            comparison=self._comparison(held_out, choice) if self._study.recipe.systems else None,
        )
        if judges := judge_reports(self._answering):
            results["judges"] = judges
        examples = example_answers(held_out, choice.best_method, self._study.combinations)
        write_text(self._folder.samples, samples_page(held_out, self._study.combinations))
        write_text(self._folder.examples, json.dumps(examples, indent=2, ensure_ascii=False) + "\n")
        self._write(results)

    def pairs(self) -> None:
        """Sample the base's answers once, and make pairs for every side from them."""
        with self._costs.stage("pairs"):
            Pairing(self._answering).run()

    def train(self) -> None:
        """Train one expert for each side."""
        study, folder = self._study, self._folder
        jobs = [ExpertJob(side, folder.pairs(side), folder.experts / side) for side in study.catalogue.sides]
        with self._costs.stage("train"), self._stage(f"training {len(jobs)} experts", None) as bar:
            train_experts(
                jobs,
                base=study.base,
                recipe=study.training_recipe,
                catalogue=study.catalogue,
                device=study.device,
                seed=study.seed,
                resume=True,
                workers=study.num_workers,
                progress=TrainingBar(bar, len(jobs)),
            )
            if study.num_workers > 1:
                self._costs.saw_children(min(study.num_workers, len(jobs)))

    def merge(self, choice: Choice) -> None:
        """Merge an adapter for each combination of sides with each method at its best weight."""
        from personalized_soups.adapters.library import ExpertLibrary
        from personalized_soups.merging.writing.adapter import merge

        library = ExpertLibrary.open(self._folder.experts)
        wanted = [(method, sides) for method in choice.weights for sides in self._study.combinations]
        with self._costs.stage("merge"), self._stage("merging personal models", len(wanted)) as bar:
            for done, (method, sides) in enumerate(wanted, start=1):
                target = self._folder.soup(method, sides)
                if not target.is_dir():
                    weights = dict.fromkeys(sides, choice.weights[method])
                    merge(library, Profile(user="+".join(sides), method=method, weights=weights)).write(target)
                bar.update(done)

    def external(self, name: str, drawn: ExternalPrompts) -> None:
        """Repeat the comparison on prompts of another file, and add it to the results."""
        results = _results(self._folder)
        if name in results.get("external", {}):
            return
        choice = choice_in(results)
        evaluating = Evaluating(self._answering, self._grader(), choice)
        with self._costs.stage(f"external {name}"):
            graded = evaluating.graded(f"answering prompts of {name}", f"external-{name}", drawn.prompts)
        comparison: ExternalComparison = {
            **self._comparison(graded, choice),
            "file": drawn.file,
            "num_in_file": drawn.num_in_file,
            "num_skipped": drawn.num_skipped,
        }
        results["external"] = {**results.get("external", {}), name: comparison}
        results["seconds"], results["memory"] = self._costs.seconds, self._costs.memory
        self._write(results)

    def _comparison(self, graded: HeldOut, choice: Choice) -> Comparison:
        return compare(
            graded,
            sides=self._study.sides,
            combinations=self._study.combinations,
            best_method=choice.best_method,
            single_experts=choice.single_experts,
            seed=self._study.seed,
        )

    def _grader(self) -> Grader:
        """Return what grades answers. Judges are trained and the gate is calibrated, if the recipe has them."""
        recipe = self._study.recipe
        if recipe.fluency is None and not recipe.judges:
            return self._study.grader({}, None)
        with self._costs.stage("calibrate"):
            return self._study.grader(judges_of(self._answering), calibrated_gate(self._answering))

    def _write(self, results: Results) -> None:
        write_text(self._folder.results, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
