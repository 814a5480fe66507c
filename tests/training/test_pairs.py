from __future__ import annotations

from pathlib import Path

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.generation.generator import Generator
from personalized_soups.training.data import read_preferences, write_pairs
from personalized_soups.training.pairs import label_pool
from personalized_soups.training.rollouts import Sampled, read_pool, sample_pool, write_pool

CATALOGUE = Catalogue.model_validate_json(
    """{"dimensions": {"informativeness": {"about": "length", "scorer": {"kind": "length", "low": 0, "high": 10},
        "sides": {"concise": {"label": "P2A", "instruction": "Be brief.", "end": "low"},
                  "informative": {"label": "P2B", "instruction": "Tell all."}}}}}"""
)


def _words(count: int) -> str:
    return " ".join(["word"] * count)


def test_the_best_is_paired_with_the_worst_and_each_answer_once() -> None:
    pool = [Sampled("How?", tuple(_words(count) for count in (5, 1, 9, 4, 2)))]
    pairs = label_pool(pool, "informative", CATALOGUE, min_gap=0.3)
    found = {(pair["chosen"], pair["rejected"]): (pair["chosen_score"], pair["rejected_score"]) for pair in pairs}
    assert found == {(_words(9), _words(1)): (0.9, 0.1), (_words(5), _words(2)): (0.5, 0.2)}
    turned = label_pool(pool, "concise", CATALOGUE, min_gap=0.3)
    assert {(pair["rejected"], pair["chosen"]) for pair in turned} == set(found)


def test_no_pair_below_the_gap() -> None:
    pool = [Sampled("a", (_words(5), _words(3))), Sampled("b", (_words(5), _words(1)))]
    (pair,) = label_pool(pool, "informative", CATALOGUE, min_gap=0.3)
    assert pair["prompt"] == "b"
    with pytest.raises(InputError, match=r"differ by 0\.5"):
        label_pool(pool, "informative", CATALOGUE, min_gap=0.5)


def test_an_invalid_answer_is_never_chosen_and_rejected_only_for_want_of_a_valid_one() -> None:
    pool = [
        Sampled("both valid", (_words(9), _words(1), "...")),
        Sampled("one valid", (_words(9), "...")),
        Sampled("one valid and bad", (_words(1), "...")),
        Sampled("none valid", ("...", "!!")),
    ]
    pairs = label_pool(pool, "informative", CATALOGUE, min_gap=0.3)
    assert [(pair["prompt"], pair["rejected"]) for pair in pairs] == [("both valid", _words(1)), ("one valid", "...")]
    (kept,) = label_pool(pool, "informative", CATALOGUE, min_gap=0.3, max_pairs=1)
    assert kept["prompt"] == "both valid"
    # this side wants brief answers, and "..." is very brief: an invalid answer is still never chosen
    concise = label_pool(pool, "concise", CATALOGUE, min_gap=0.3)
    assert all(pair["chosen"] != "..." for pair in concise)


def test_a_choice_of_pairs_depends_on_the_seed() -> None:
    pool = [Sampled(str(number), (_words(9), _words(1))) for number in range(50)]

    def chosen(seed: int) -> list[str]:
        return [p["prompt"] for p in label_pool(pool, "concise", CATALOGUE, max_pairs=10, seed=seed)]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(set(chosen(0))) == 10


def test_pairs_for_a_chat_template_are_conversations(small_base: Path, tmp_path: Path) -> None:
    generator = Generator.open(small_base, device="cpu")
    prompts = ["wash the kettle", "rub the towel", "dry it"]
    pool = sample_pool(generator, prompts, max_new_tokens=30, num_samples=6)
    pairs = label_pool(pool, "concise", CATALOGUE, min_gap=0.05, conversational=True)
    assert pairs[0]["prompt"][0]["role"] == "user"
    assert pairs[0]["chosen"][0]["role"] == "assistant"
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_preferences(tmp_path / "pairs.jsonl").conversational
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_pool_is_sampled_once_and_read_again(small_base: Path, tmp_path: Path) -> None:
    generator = Generator.open(small_base, device="cpu")
    done: list[int] = []
    pool = sample_pool(generator, ["wash", "rub"], num_samples=3, max_new_tokens=6, batch_size=4, on_done=done.append)
    assert done == [4, 6]
    assert [len(sampled.answers) for sampled in pool] == [3, 3]
    write_pool(tmp_path / "pool.jsonl", pool)
    assert read_pool(tmp_path / "pool.jsonl") == pool


_ODD_ANSWERS = ('{"prompt": "x", "answers": [1]}', '{"answers": []}', '{"prompt": "x", "answers": "yes"}')


@pytest.mark.parametrize("line", ["{", "[]", "[" * 99_999, '{"prompt": "x"}', *_ODD_ANSWERS])
def test_a_faulty_pool_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text('{"prompt": "x", "answers": ["y"]}\n' + line)
    with pytest.raises(InputError) as caught:
        read_pool(path)
    assert caught.value.where.split(": ")[0] == f"{path}:2"


@pytest.mark.parametrize(
    ("answers", "why", "mend"),
    [
        (("", " "), "no answer is valid", "pool=FILE"),
        (("one two three",) * 2, "every valid answer scores", "change the scorer"),
        (("one two three", "one two three four"), "all scores lie between", "lower the minimum gap"),
    ],
)
def test_it_is_said_why_there_is_no_pair(answers: tuple[str, ...], why: str, mend: str) -> None:
    with pytest.raises(InputError, match="no two answers differ") as caught:
        label_pool([Sampled("x", answers)], "concise", CATALOGUE, min_gap=0.9)
    assert why in caught.value.what
    assert mend in caught.value.mend


def test_an_unknown_side_and_an_impossible_gap() -> None:
    with pytest.raises(DeclarationError) as caught:
        label_pool([], "concice", CATALOGUE)
    assert "concise" in caught.value.mend
    for gap in (0.0, 1.5):
        with pytest.raises(ValueError, match="min_gap"):
            label_pool([], "concise", CATALOGUE, min_gap=gap)
