"""The step that answers prompts: which rows each system has, and what an interrupted step keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import AnswersStep
from personalized_soups.mixing.model import SoupModel
from personalized_soups.studies.pipeline.answering import Answer, read_answers
from personalized_soups.studies.pipeline.world import World
from tests.experts import write_expert

CATALOGUE = """
dimensions:
  size:
    about: How long the answer is.
    scorer: {kind: length, low: 0, high: 20}
    sides:
      short: {instruction: Be brief., end: low}
      long: {instruction: Tell all.}
  tone:
    about: Whether it is warm.
    scorer: {kind: markers, high: [lamp], low: [soap]}
    sides:
      cold: {instruction: Be cold., end: low}
      warm: {instruction: Be warm.}
"""
PROMPTS = ["wash the kettle", "rub the towel", "dry the old soap"]
COMBINATIONS = (("short", "cold"), ("short", "warm"), ("long", "cold"), ("long", "warm"))


class Kitchen:
    """A world with experts on a small base, and the answers of steps."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder = folder
        (folder / "catalogue.yaml").write_text(CATALOGUE)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        self.world = World(str(base), "00", load(folder / "catalogue.yaml", Catalogue), 0, "cpu")
        for seed, side in enumerate(("short", "long", "cold", "warm")):
            write_expert(folder / f"experts-{side}" / side, seed=seed)
        self.experts = {side: folder / f"experts-{side}" for side in ("short", "long", "cold", "warm")}

    def answered(
        self, *, inputs: dict[str, Path] | None = None, work: str = "work", models: Any = None, **step: Any
    ) -> Path:
        """Run a step, and return the folder of its answers."""
        declared = AnswersStep(kind="answers", prompts="prompts.txt", max_new_tokens=8, **step)
        folder = self.folder / work
        folder.mkdir(exist_ok=True)
        answer = Answer(self.world, declared, self.folder / "prompts.txt", COMBINATIONS, models or {})
        answer(folder, inputs or {}, lambda _: None)
        return folder


@pytest.fixture
def kitchen(small_base: Path, tmp_path: Path) -> Kitchen:
    return Kitchen(small_base, tmp_path)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the rows that the model is asked for. Row n is answered by "answer n"."""
    asked: list[dict[str, Any]] = []

    def generate(self: SoupModel, prompts: Sequence[str], profiles: Sequence[Any], **options: Any) -> list[str]:
        places = options["places"]
        weights = options.get("log_prob_weights") or [None] * len(prompts)
        first = len(asked)
        for prompt, profile, place, weight in zip(prompts, profiles, places, weights, strict=True):
            chosen = None if profile is None else dict(profile.weights)
            asked.append({"prompt": prompt, "weights": chosen, "place": place, "log_prob_weight": weight})
        return [f"answer {first + at}" + " and lamp" * (at % 3) for at in range(len(prompts))]

    monkeypatch.setattr(SoupModel, "generate", generate)
    return asked


def test_the_base_answers_once_for_all_combinations(kitchen: Kitchen, rows: list[dict[str, Any]]) -> None:
    found = read_answers(kitchen.answered())
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["place"] for row in rows] == [0, 1, 2]
    assert all(row["weights"] is None for row in rows)
    assert list(found) == [()]
    assert found[()][0] == PROMPTS


def test_a_prompted_base_reads_the_instructions(kitchen: Kitchen, rows: list[dict[str, Any]]) -> None:
    found = read_answers(kitchen.answered(prompted=True))
    assert list(found) == list(COMBINATIONS)
    assert rows[0]["prompt"] == "Be brief. Be cold.\n\nwash the kettle"
    assert rows[-1]["prompt"] == "Tell all. Be warm.\n\ndry the old soap"
    assert found["short", "cold"][0] == PROMPTS  # scorers read the plain prompt


def test_experts_are_mixed_by_the_combination(kitchen: Kitchen, rows: list[dict[str, Any]]) -> None:
    kitchen.answered(inputs=kitchen.experts, experts="experts", weight=0.6)
    assert [row["weights"] for row in rows[::3]] == [{one: 0.6, two: 0.6} for one, two in COMBINATIONS]
    assert [row["place"] for row in rows] == [0, 1, 2] * 4


def test_log_probabilities_are_mixed_in_groups_of_rows(kitchen: Kitchen, rows: list[dict[str, Any]]) -> None:
    kitchen.answered(inputs=kitchen.experts, experts="experts", weight=0.5, mixing="log_probs", batch_size=4)
    assert [row["weights"] for row in rows[:4]] == [{"short": 1.0}, {"cold": 1.0}] * 2
    assert [row["place"] for row in rows[:4]] == [0, 0, 1, 1]
    assert {row["log_prob_weight"] for row in rows} == {0.5}
    assert len(rows) == 2 * 3 * 4


def test_policies_answer_for_their_combinations(kitchen: Kitchen, rows: list[dict[str, Any]]) -> None:
    names = {sides: side for sides, side in zip(COMBINATIONS, kitchen.experts, strict=True)}
    kitchen.answered(inputs=kitchen.experts, policies="policies", models=names)
    assert [row["weights"] for row in rows[::3]] == [{name: 1.0} for name in names.values()]
    del rows[:]
    single = dict.fromkeys(COMBINATIONS, "warm")
    found = read_answers(kitchen.answered(inputs=kitchen.experts, policies="policies", models=single, work="single"))
    assert list(found) == [()]  # the same policy without a prompt answers all combinations alike
    assert [row["weights"] for row in rows] == [{"warm": 1.0}] * 3


def test_the_best_candidate_is_chosen_for_each_combination(kitchen: Kitchen, rows: list[dict[str, Any]]) -> None:
    found = read_answers(kitchen.answered(num_candidates=3))
    assert [row["place"] for row in rows] == list(range(9))  # each candidate has its own random numbers
    assert list(found) == list(COMBINATIONS)
    # candidates have 2, 4 and 6 words, of which 0, 1 and 2 are warm
    assert found["short", "cold"][1][0] == "answer 0"
    assert found["long", "warm"][1][0] == "answer 2 and lamp and lamp"


@pytest.mark.parametrize("step", [{}, {"num_candidates": 2}, {"experts": "experts", "weight": 0.6}])
def test_an_interrupted_step_ends_with_the_same_answers(step: dict[str, Any], *, kitchen: Kitchen) -> None:
    inputs = kitchen.experts if "experts" in step else {}
    whole = kitchen.answered(inputs=inputs, batch_size=2, **step) / "answers.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    assert len({json.loads(line)["answer"] for line in lines}) > 1

    class StoppedError(Exception):
        pass

    def stop(content: Any) -> None:
        if str(content).startswith("2/"):
            raise StoppedError

    declared = AnswersStep(kind="answers", prompts="prompts.txt", max_new_tokens=8, batch_size=2, **step)
    answer = Answer(kitchen.world, declared, kitchen.folder / "prompts.txt", COMBINATIONS, {})
    work = kitchen.folder / "again"
    work.mkdir()
    with pytest.raises(StoppedError):
        answer(work, inputs, stop)
    begun = (work / "answers.jsonl").read_text()
    assert whole.read_text().startswith(begun)
    assert 0 < len(begun) < len(whole.read_text())
    done: list[Any] = []
    answer(work, inputs, done.append)
    assert (work / "answers.jsonl").read_bytes() == whole.read_bytes()
    assert not str(done[0]).startswith(("1/", "2/"))  # finished batches are not answered again
