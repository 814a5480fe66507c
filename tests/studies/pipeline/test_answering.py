"""The step that answers prompts: which rows each system has, and what an interrupted step keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.merging.writing.adapter import merge
from personalized_soups.mixing.model import SoupModel
from personalized_soups.studies.pipeline.answering import read_answers
from tests.base_adapters import trained_on, write_sft
from tests.experts import write_expert
from tests.studies.pipeline.kitchen import COMBINATIONS, PROMPTS, Kitchen


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

    answer = kitchen.answer(batch_size=2, **step)
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


def test_a_choice_gives_the_method_and_the_weight(kitchen: Kitchen, rows: list[dict[str, Any]]) -> None:
    choice = {"method": "factor_average", "weights": {"linear": 0.4, "factor_average": 0.8}}
    (kitchen.folder / "chosen").mkdir()
    (kitchen.folder / "chosen" / "choice.json").write_text(json.dumps(choice))
    inputs = {**kitchen.experts, "chosen": kitchen.folder / "chosen"}
    folder = kitchen.answered(inputs=inputs, experts="experts", choice="chosen")
    assert json.loads((folder / "mixing.json").read_text()) == {"method": "factor_average", "weight": 0.8}
    # a soup of another method than linear is an adapter of its own
    assert [row["weights"] for row in rows[::3]] == [{f"factor_average-{one}+{two}": 1.0} for one, two in COMBINATIONS]
    del rows[:]
    folder = kitchen.answered(inputs=inputs, experts="experts", choice="chosen", method="linear", work="linear")
    assert json.loads((folder / "mixing.json").read_text()) == {"method": "linear", "weight": 0.4}
    assert [row["weights"] for row in rows[::3]] == [{one: 0.4, two: 0.4} for one, two in COMBINATIONS]


def test_a_merged_method_answers_as_the_merged_adapter_does(kitchen: Kitchen) -> None:
    folder = kitchen.answered(inputs=kitchen.experts, experts="experts", weight=0.9, method="factor_average")
    found = read_answers(folder)
    library = ExpertLibrary.open(*kitchen.experts.values())
    merged = []
    for sides in COMBINATIONS:
        profile = Profile(method="factor_average", weights=dict.fromkeys(sides, 0.9))
        merged.append(merge(library, profile).write(kitchen.folder / "merged" / "+".join(sides)))
    model = SoupModel.from_pretrained(kitchen.world.base, merged, device="cpu")
    for sides in COMBINATIONS:
        answers = model.generate(
            PROMPTS, Profile(weights={"+".join(sides): 1.0}), max_new_tokens=8, temperature=0.7, seed=3000
        )
        assert found[sides][1] == answers


def test_experts_on_an_adapter_answer_with_the_adapter_and_so_does_the_base(kitchen: Kitchen) -> None:
    sft = write_sft(kitchen.folder / "sft")
    before = read_answers(kitchen.answered(work="before"))
    kitchen.world = replace(kitchen.world, on=sft)
    for side, folder in kitchen.experts.items():
        trained_on(folder / side, sft)
    found = read_answers(kitchen.answered(inputs=kitchen.experts, experts="experts", weight=0.6, work="on"))
    model = SoupModel.from_pretrained(kitchen.world.base, list(kitchen.experts.values()), on=sft, device="cpu")
    for one, two in COMBINATIONS:
        profile = Profile(weights={one: 0.6, two: 0.6})
        assert found[one, two][1] == model.generate(PROMPTS, profile, max_new_tokens=8, temperature=0.7, seed=3000)
    plain = read_answers(kitchen.answered(work="base"))
    assert plain[()][1] == model.generate(PROMPTS, None, max_new_tokens=8, temperature=0.7, seed=3000)
    assert plain != before


def test_backbones_have_the_weights_of_bone_soups(kitchen: Kitchen, rows: list[dict[str, Any]]) -> None:
    backbones = {}
    for seed, name in enumerate(("size", "tone")):
        write_expert(kitchen.folder / f"bones-{name}" / name, seed=seed)
        backbones[f"bones-{name}"] = kitchen.folder / f"bones-{name}"
    work = kitchen.folder / "bones"
    work.mkdir()
    kitchen.answer(experts="bones", weight=0.5, beta=0.75)(work, backbones, lambda _: None)
    for row, (one, two) in zip(rows[::3], COMBINATIONS, strict=True):
        wanted = np.array([1.0 if one == "long" else -1.0, 1.0 if two == "warm" else -1.0])
        # what the backbones were trained for, weighted, is half of what the user wants
        mixed = np.array([[0.75, 0.25], [0.25, 0.75]]).T @ np.array([row["weights"]["size"], row["weights"]["tone"]])
        assert mixed == pytest.approx(0.5 * wanted)
