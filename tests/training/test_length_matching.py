from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.scoring.scorers import Scored, Scorer
from personalized_soups.training.length_matching import length_difference, matched_selection, num_words
from personalized_soups.training.pairs import label_pool
from personalized_soups.training.rollouts import Sampled

CATALOGUE = Catalogue.model_validate_json(
    """{"dimensions": {
        "style": {"about": "tone", "scorer": {"kind": "markers", "high": ["glad"], "low": ["whatever"]},
                  "sides": {"warm": {"instruction": "Be warm."}, "cold": {"instruction": "Be cold.", "end": "low"}}},
        "size": {"about": "length", "scorer": {"kind": "length", "low": 5, "high": 40},
                 "sides": {"long": {"instruction": "Tell all."}}},
        "rhyme": {"about": "tone", "about_length": true, "scorer": {"kind": "markers", "high": ["glad"], "low": []},
                  "sides": {"rhymed": {"instruction": "Rhyme."}}}}}"""
)


def _answer(marker: str, length: int) -> str:
    return " ".join([marker, *["word"] * (length - 1)])


def make_pool(num: int, *, extra: int, seed: int = 0) -> list[Sampled]:
    """Return prompts with 3 glad and 3 cold answers of 10 to 30 words. The glad ones are `extra` words longer."""
    rng = random.Random(seed)
    return [
        Sampled(
            f"prompt {number}",
            tuple(_answer("glad", rng.randrange(10, 30) + extra) for _ in range(3))
            + tuple(_answer("whatever", rng.randrange(10, 30)) for _ in range(3)),
        )
        for number in range(num)
    ]


def test_pairs_of_a_style_do_not_teach_length() -> None:
    pool = make_pool(60, extra=6)
    free = length_difference(label_pool(pool, "warm", CATALOGUE))
    assert free.low > 4
    matched = label_pool(pool, "warm", CATALOGUE, match_length=True)
    found = length_difference(matched)
    assert abs(found.mean) <= max(0.5, 0.01 * (found.chosen + found.rejected) / 2)
    assert len(matched) >= 90  # at least half of the 180 pairs of three glad and three cold answers
    assert found.low < 0 < found.high
    assert label_pool(pool, "warm", CATALOGUE, match_length=True) == matched
    opposite = length_difference(label_pool(pool, "cold", CATALOGUE, match_length=True))
    assert abs(opposite.mean) <= 0.5


def test_answers_of_similar_length_are_paired_each_once() -> None:
    answers = tuple(_answer("glad", n) for n in (10, 20, 30)) + tuple(_answer("whatever", n) for n in (29, 11, 20))
    pairs = label_pool([Sampled("p", answers)], "warm", CATALOGUE, match_length=True)
    lengths = sorted((num_words(pair["chosen"]), num_words(pair["rejected"])) for pair in pairs)
    assert lengths == [(10, 11), (20, 20), (30, 29)]


def test_the_best_pair_is_not_given_up_for_its_length() -> None:
    # a scorer of four grades: a gap of 0.9 with 2 words of difference beats a gap of 0.4 with none
    grades = {"best": 1.0, "good": 0.5, "poor": 0.1}

    def score(prompt: str, answer: str, /) -> Scored:
        return Scored(grades[answer.split(maxsplit=1)[0]], valid=True)

    scorers: dict[str, Scorer] = {"style": score}
    pool = [Sampled("p", (_answer("best", 22), _answer("good", 20), _answer("poor", 20)))]
    (pair,) = label_pool(pool, "warm", CATALOGUE, match_length=True, scorers=scorers)
    assert (pair["chosen"].split()[0], pair["rejected"].split()[0]) == ("best", "poor")


@pytest.mark.parametrize("side", ["long", "rhymed"])
def test_a_side_about_length_is_not_matched(side: str) -> None:
    pool = make_pool(30, extra=6)
    assert CATALOGUE.is_about_length(side)
    assert not CATALOGUE.is_about_length("warm")
    assert label_pool(pool, side, CATALOGUE, match_length=True) == label_pool(pool, side, CATALOGUE)


def test_the_number_of_pairs_is_kept_where_exchanges_are_enough() -> None:
    pool = make_pool(60, extra=3)
    pairs = label_pool(pool, "warm", CATALOGUE, match_length=True, max_pairs=60)
    assert len(pairs) == 60
    assert abs(length_difference(pairs).mean) <= 0.5
    other = label_pool(pool, "warm", CATALOGUE, match_length=True, max_pairs=60, seed=1)
    assert {pair["prompt"] for pair in other} != {pair["prompt"] for pair in pairs}


def test_an_invalid_answer_is_rejected_only_for_want_of_a_valid_one() -> None:
    for answers, rejected in (
        ((_answer("glad", 9), "..."), "..."),
        ((_answer("glad", 9), _answer("whatever", 9), "..."), _answer("whatever", 9)),
    ):
        (pair,) = label_pool([Sampled("p", answers)], "warm", CATALOGUE, match_length=True)
        assert pair["rejected"] == rejected


@pytest.mark.parametrize("seed", range(20))
def test_a_selection_is_as_near_as_some_selection_can_be(seed: int) -> None:
    rng = random.Random(seed)
    differences = [rng.randrange(-4, 9) for _ in range(9)]
    kept = matched_selection(differences, [50.0] * 9, max_pairs=None)
    mean = sum(differences[index] for index in kept) / len(kept)
    # by trying all selections of at least 5 of the 9 pairs
    means = [abs(sum(chosen)) / size for size in range(5, 10) for chosen in combinations(differences, size)]
    assert len(kept) >= 5
    assert abs(mean) <= 0.5 or abs(mean) <= min(means) + 1.0
    assert abs(mean) <= abs(sum(differences)) / 9


def test_where_all_chosen_answers_are_longer_half_of_the_pairs_stay() -> None:
    differences = [10, 2, 30, 4, 1, 20, 8, 16]
    kept = matched_selection(differences, [50.0] * 8, max_pairs=None)
    assert [differences[index] for index in kept] == [2, 4, 1, 8]
    assert matched_selection([], [], max_pairs=3) == []
    assert matched_selection([0, 0, 0], [9.0] * 3, max_pairs=2) == [0, 1]


def test_the_difference_has_the_interval_of_a_mean_of_clusters() -> None:
    rng = np.random.default_rng(0)
    shifts, counts = rng.integers(-5, 15, size=40), rng.integers(1, 4, size=40)
    pairs = [
        {"prompt": f"{prompt}", "chosen": "a " * int(20 + shifts[prompt]), "rejected": "a " * 20}
        for prompt in range(40)
        for _ in range(counts[prompt])
    ]
    found = length_difference(pairs)
    differences = np.array([len(pair["chosen"].split()) - 20 for pair in pairs], dtype=float)
    assert found.mean == pytest.approx(differences.mean())
    assert found.chosen == pytest.approx(20 + differences.mean())
    # the same by resampling prompts
    prompts = np.array([int(pair["prompt"]) for pair in pairs])
    groups = [differences[prompts == prompt] for prompt in range(40)]
    draws = [np.concatenate([groups[g] for g in rng.integers(40, size=40)]).mean() for _ in range(2000)]
    assert found.high - found.mean == pytest.approx(1.96 * np.std(draws), rel=0.1)
    conversation = {"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "a b"}]}
    single = length_difference([{**conversation, "rejected": [{"role": "assistant", "content": "c"}]}])
    assert (single.mean, single.low, single.high) == (1.0, 1.0, 1.0)


def test_a_cut_last_sentence_is_removed_before_scoring() -> None:
    pool = [Sampled("p", ("I am glad. Whatever you", "Whatever. I am glad to s"))]
    (pair,) = label_pool(pool, "warm", CATALOGUE, whole_sentences=True)
    assert (pair["chosen"], pair["rejected"]) == ("I am glad.", "Whatever.")
    assert (pair["chosen_score"], pair["rejected_score"]) == (1.0, 0.0)
