"""A study like that of a real base, on the tiny base: mixed batches, all systems, judges, a gate, external prompts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from personalized_soups.declare.dimension import LengthScorer
from personalized_soups.declare.evaluation import (
    ExternalRecipe,
    FluencyRecipe,
    PairsRecipe,
    SelectionRecipe,
    StudyRecipe,
    SweepRecipe,
)
from personalized_soups.declare.fluency import FluencyBounds
from personalized_soups.declare.loader import load
from personalized_soups.declare.prompt_set import load_prompt_set
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import OutputExistsError
from personalized_soups.evaluation.report import report
from personalized_soups.evaluation.results import Examples, Results
from personalized_soups.scoring.fluency import FluencyGate
from personalized_soups.studies.quickstart import run_study
from personalized_soups.studies.study import Study
from personalized_soups.studies.ten_answers.study import BASE, DECLARED, INFERRED, TenAnswersStudy, run_ten_answers
from personalized_soups.tiny import corpus
from personalized_soups.training.rollouts import read_pool

pytestmark = pytest.mark.slow

NUM_TEST, NUM_VALIDATION = 4, 2
JUDGE = LengthScorer(kind="length", low=3, high=30)
SMALL = StudyRecipe(
    pairs=PairsRecipe(num_prompts=18, num_samples=3, plain=1, instructed=2, min_gap=0.3, max_pairs=8),
    selection=SelectionRecipe(num_prompts=NUM_VALIDATION, weights={"linear": (0.5, 0.9), "factor_average": (1.0,)}),
    sweep=SweepRecipe(num_prompts=2, num_steps=2),
    num_prompts=NUM_TEST,
    max_new_tokens=50,
    batch_size=10,
    systems=("preference_prompting", "single_expert", "soup_prompting"),
    judges={"expertise": JUDGE, "informativeness": JUDGE, "style": JUDGE},
    fluency=FluencyRecipe(accept=0.5, num_samples=2),
    external=ExternalRecipe(num_prompts=3, max_prompt_tokens=40),
)


@contextmanager
def quiet(title: str, total: int | None) -> Iterator[Quiet]:
    yield Quiet()


class Quiet:
    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        pass


def prompt_file(folder: Path) -> Path:
    """Write questions of the tiny base's world as a file of prompts."""
    lines = [
        {"prompt": prompt, "kind": prompt.split()[0], "subject": f"{split} {at}", "split": ours}
        for ours, split, count in (("train", "seen", 18), ("validation", "validation", 8), ("test", "held-out", 4))
        for at, prompt in enumerate(corpus.prompts(split, count, seed=5))  # type: ignore[arg-type]
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def study_of(prompts: Path) -> Study:
    recipe = load(shipped_recipe("train/tiny.yaml"), TrainingRecipe)
    return Study(
        recipe=SMALL,
        training=recipe.replaced(optimizer=recipe.optimizer.replaced(max_steps=2, batch_size=4)),
        prompts=load_prompt_set(prompts),
        device="cpu",
    )


Finished = tuple[Study, Path, Path, Results, Examples]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("compared")
    other = folder / "other.jsonl"
    asked = corpus.prompts("held-out", 5, seed=9)
    lines = [*({"prompt": prompt} for prompt in asked), {"prompt": "too long " * 30}]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    study, out = study_of(prompt_file(folder)), folder / "run"
    results, examples = run_study(study, out, stage=quiet, external={"other": other})
    return study, out, other, results, examples


def test_every_system_has_scores_on_the_test_prompts_and_on_the_others(finished: Finished) -> None:
    study, out, _, results, _ = finished
    systems = ["base", "preference_prompting", "single_expert", "linear", "factor_average", "soup_prompting"]
    for comparison, count in ((results["comparison"], NUM_TEST), (results["external"]["other"], 3)):
        assert comparison["num_prompts"] == count
        assert [row["system"] for row in comparison["averages"]] == systems
        assert len(comparison["rows"]) == 8 * len(systems)
        assert len(comparison["movements"]) == 8 * 3
        assert all("judged_joint" in row for row in comparison["rows"])
        for row in comparison["rows"]:
            assert row["joint"] <= row["valid"]
            if row["system"] == "single_expert":
                assert row["expert"] in row["sides"]
    other = results["external"]["other"]
    assert (other["num_in_file"], other["num_skipped"], other["file"]) == (6, 1, "other.jsonl")
    assert {check["name"] for check in results["checks"]} >= {"joint of the best soup minus the base's"}
    assert {"pairs", "calibrate", "train", "choose", "merge", "evaluate", "external other"} == set(results["seconds"])
    text = report(results, examples=finished[4])
    assert "### other\n\n3 of the 6 prompts of other.jsonl, drawn at random. 1 prompts were too long" in text
    assert "| soup + prompting " in text
    assert study.test_prompts[0] in (out / "samples.md").read_text()


def test_the_gate_is_calibrated_on_training_prompts_and_rejects_answers_everywhere(finished: Finished) -> None:
    """The oracle is the gate itself, opened anew with the stored bounds, on the stored answers."""
    study, out, _, results, _ = finished
    (first, second) = stored(out, "calibration").values()
    bounds = load(out / "fluency.yaml", FluencyBounds)
    assert bounds.about["num_answers"] == 2 * 18
    assert bounds.max_new_tokens == SMALL.max_new_tokens
    gate = FluencyGate.open(study.base, bounds, device="cpu")
    own = [*gate.valid(study.train_prompts, first), *gate.valid(study.train_prompts, second)]
    assert sum(own) / 36 == bounds.about["accepted"] >= 0.5
    grader = study.grader(dict.fromkeys(study.sides, JUDGE), gate)
    base = grader.graded(study.test_prompts, stored(out, "held-out")["base"])
    assert results["base"]["valid"] == sum(entry.valid for entry in base) / NUM_TEST
    sides = ("expert", "concise", "friendly")
    answers = stored(out, "held-out")[f"preference_prompting {'+'.join(sides)}"]
    prompted = grader.graded(study.test_prompts, answers)  # measured as answers to the plain prompts
    (row,) = [
        row
        for row in results["comparison"]["rows"]
        if row["system"] == "preference_prompting" and tuple(row["sides"]) == sides
    ]
    assert row["valid"] == sum(entry.valid for entry in prompted) / NUM_TEST


def test_part_of_the_pool_is_sampled_under_instructions_and_pairs_have_plain_prompts(finished: Finished) -> None:
    study, out, *_ = finished
    pool = read_pool(out / "pool.jsonl")
    assert tuple(sampled.prompt for sampled in pool) == study.train_prompts
    used = Counter(instruction for sampled in pool for instruction in sampled.instructions)
    instructions = [side.instruction for side in study.catalogue.sides.values()]
    assert used.pop(None) == 18
    assert used == dict.fromkeys(instructions, 6)
    for side in study.catalogue.sides:
        rows = [json.loads(line) for line in (out / "pairs" / f"{side}.jsonl").read_text().splitlines()]
        assert rows
        assert {row["prompt"][-1]["content"] for row in rows} <= set(study.train_prompts)
    # The first instructed answer is the base's answer to the instruction and the prompt.
    at, turn = next((at, 1) for at, sampled in enumerate(pool) if sampled.instructions[1])
    answers = stored(out, "pool")[f"sample-{turn}"]
    assert answers[at] == pool[at].answers[turn]


def stored(out: Path, stage: str) -> dict[str, list[str]]:
    lines = (out / "answers" / f"{stage}.jsonl").read_text().splitlines()
    return {row["job"]: row["answers"] for row in map(json.loads, lines)}


def test_prompting_puts_the_sides_instructions_before_the_prompt_of_the_base_and_of_the_best_soup(
    finished: Finished,
) -> None:
    """The answers of each prompting system are those that its model gives to the prompt with the instructions."""
    from personalized_soups.generation.generator import Generator

    study, out, _, results, _ = finished
    sides = ("elementary", "informative", "friendly")
    before = "Use simple words that a child knows. Give every step and the reasons. Be warm and friendly."
    asked = [f"{before}\n\n{prompt}" for prompt in study.test_prompts]
    answers = stored(out, "held-out")
    best = out / "merged" / results["best_method"] / "+".join(sides)
    for system, adapter in (("preference_prompting", None), ("soup_prompting", best)):
        generator = Generator.open(study.base, adapter, device="cpu")
        found = generator.answers(asked, temperature=0.7, max_new_tokens=50, batch_size=4, seed=3000)
        # Merged weights differ from mixed rows by rounding, so a sampled token may differ, which is rare.
        same = [mine == theirs for (mine,), theirs in zip(found, answers[f"{system} {'+'.join(sides)}"], strict=True)]
        assert sum(same) >= NUM_TEST - 1


def test_an_interrupted_run_has_the_results_of_an_uninterrupted_run(finished: Finished, tmp_path: Path) -> None:
    study, out, other, results, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "results.json").unlink()
    for name, keep in (("held-out", 5), ("external-other", 3)):
        file = copy / "answers" / f"{name}.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:keep]) + lines[keep][:20])  # killed in the middle of a line
    again, _ = run_study(study, copy, stage=quiet, external={"other": other})
    free: dict[str, object] = {"seconds": {}, "memory": {}}
    assert {**again, **free} == {**results, **free}


def test_other_settings_and_other_external_prompts_are_refused(finished: Finished, tmp_path: Path) -> None:
    study, out, other, results, _ = finished
    changed = tmp_path / "other.jsonl"
    changed.write_text(other.read_text().replace("How", "Why"), encoding="utf-8")
    if changed.read_text() == other.read_text():
        changed.write_text("".join(reversed(other.read_text().splitlines(keepends=True))), encoding="utf-8")
    with pytest.raises(OutputExistsError, match="already drawn other prompts as 'other'"):
        run_study(study, out, stage=quiet, external={"other": changed})
    prompts = load_prompt_set(prompt_file(tmp_path))
    assert isinstance(study.prompts, type(prompts))
    fewer = [entry for entry in study.prompts.entries if entry.split == "train"][::-1]
    rest = [entry for entry in study.prompts.entries if entry.split != "train"]
    moved = type(prompts)(prompts.path, (*fewer, *rest))
    from dataclasses import replace

    with pytest.raises(OutputExistsError, match=r"other settings: prompts\n"):
        run_study(replace(study, prompts=moved), out, stage=quiet)
    assert run_study(study, out, stage=quiet)[0] == results


def test_ten_answers_of_users_give_soups_of_a_finished_study_and_are_kept(finished: Finished, tmp_path: Path) -> None:
    study, out, *_ = finished
    ten = TenAnswersStudy(study, out, num_users=3, num_answers=2, pool_prompts=8, num_questions=6, num_prompts=2)
    first = run_ten_answers(ten, tmp_path / "ten", stage=quiet)
    assert {name: len(values) for name, values in first["rewards"].items()} == dict.fromkeys(
        (BASE, INFERRED, DECLARED), 3
    )
    assert 0 <= first["sides"] <= 1
    assert first["scale"] in SMALL.selection.weights["linear"]
    answers = tmp_path / "ten" / "answers" / "soups.jsonl"
    before = answers.read_bytes()
    again = run_ten_answers(ten, tmp_path / "ten", stage=quiet)
    assert answers.read_bytes() == before
    assert again["rewards"] == first["rewards"]
