from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import DeclarationError, InputError, UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.training.instructions import InstructedShare, instructions_of, repeats
from personalized_soups.training.pairs import label_pool
from personalized_soups.training.resumable_sampling import sample_kept
from personalized_soups.training.rollouts import Sampled, read_pool, sample_pool, write_pool

SIX = ("a low", "a high", "b low", "b high", "c low", "c high")
PROMPTS = [f"wash kettle {number}" for number in range(9)]
SHARE = InstructedShare(2, ("rub it", "dry it"))
OPTIONS = {"num_samples": 3, "max_new_tokens": 6, "batch_size": 4, "seed": 5}


@pytest.mark.parametrize(("count", "per_round"), [(1, 6), (2, 3), (4, 3), (6, 1), (8, 3)])
def test_each_instruction_is_dealt_equally_often(count: int, per_round: int) -> None:
    share = InstructedShare(count, SIX)
    dealt = [share.of_prompt(index, num_samples=count + 2) for index in range(4 * per_round)]
    assert all(own[:2] == (None, None) and None not in own[2:] for own in dealt)
    counts = Counter(instruction for own in dealt for instruction in own[2:])
    assert set(counts.values()) == {4 * per_round * count // 6}


def test_opposite_sides_are_dealt_to_one_prompt_whatever_its_kind() -> None:
    share = InstructedShare(2, SIX)
    dealt = [share.of_prompt(index, num_samples=2) for index in range(60)]
    assert {own[0][0] == own[1][0] for own in dealt if own[0] and own[1]} == {True}
    # prompts whose kinds repeat with the period of a round still get every instruction
    for kind in range(3):
        assert len({own for own in dealt[kind::3]}) == 3


def test_what_cannot_be_dealt_is_rejected() -> None:
    assert InstructedShare(0, ()).of_prompt(3, num_samples=2) == (None, None)
    for count, instructions in ((-1, SIX), (1, ())):
        with pytest.raises(ValueError, match="count"):
            InstructedShare(count, instructions)
    with pytest.raises(ValueError, match="3 of 2"):
        InstructedShare(3, SIX).of_prompt(0, num_samples=2)


def test_the_instructions_of_a_catalogue_and_of_one_dimension() -> None:
    catalogue = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
    assert instructions_of(catalogue) == tuple(side.instruction for side in catalogue.sides.values())
    assert instructions_of(catalogue, "friendly") == ("Be warm and friendly.", "Be cold and unfriendly.")
    with pytest.raises(DeclarationError, match="frendly"):
        instructions_of(catalogue, "frendly")


def test_answers_are_sampled_under_their_instruction_and_kept_with_the_plain_prompt(small_base: Path) -> None:
    generator = Generator.open(small_base, device="cpu")
    pool = sample_pool(generator, PROMPTS, instructed=SHARE, **OPTIONS)  # type: ignore[arg-type]
    for place, sampled in enumerate(pool):
        assert sampled.prompt == PROMPTS[place]
        assert Counter(sampled.instructions) == Counter([None, "rub it", "dry it"])
        for turn, instruction in enumerate(sampled.instructions):
            asked = sampled.prompt if instruction is None else f"{instruction}\n\n{sampled.prompt}"
            ((alone,),) = generator.answers([asked], max_new_tokens=6, seed=5, places=[3 * place + turn])
            assert sampled.answers[turn] == alone
    plain = sample_pool(generator, PROMPTS, **OPTIONS)  # type: ignore[arg-type]
    assert [sampled.answers[0] for sampled in plain] == [sampled.answers[0] for sampled in pool]
    assert all(sampled.instructions == () for sampled in plain)


def test_an_interrupted_instructed_run_resumes_with_the_same_answers(small_base: Path, tmp_path: Path) -> None:
    generator, kept = Generator.open(small_base, device="cpu"), tmp_path / "kept"
    settings = {**OPTIONS, "batch_size": 1, "kept": kept, "base": "b"}  # portions of 8 // 3 = 2 prompts
    whole = sample_kept(generator, PROMPTS, instructed=SHARE, **settings)  # type: ignore[arg-type]
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:6]) + lines[6][:9])
    begun: list[int] = []
    again = sample_kept(generator, PROMPTS, instructed=SHARE, on_begin=begun.append, **settings)  # type: ignore[arg-type]
    assert again == whole
    assert begun == [12]  # 4 of the 5 prompts: the fifth begins a portion
    kept.write_text("".join(lines[:6]))
    for other in (None, InstructedShare(1, SHARE.instructions), InstructedShare(2, ("rub it", "wash it"))):
        with pytest.raises(UsageError, match="differ in instructed"):
            sample_kept(generator, PROMPTS, instructed=other, **settings)  # type: ignore[arg-type]


def test_a_pool_records_the_instruction_of_each_answer_and_old_pools_are_read(tmp_path: Path) -> None:
    pool = [Sampled("p", ("x", "y"), (None, "rub it")), Sampled("q", ("z",))]
    path = tmp_path / "pool.jsonl"
    write_pool(path, pool)
    assert read_pool(path) == pool
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["instructions"] == [None, "rub it"]
    assert rows[1] == {"prompt": "q", "answers": ["z"]}  # as earlier versions wrote it
    assert Sampled("q", ("z",), (None,)) == Sampled("q", ("z",))
    with pytest.raises(ValueError, match="2 answers have 1 instructions"):
        Sampled("p", ("x", "y"), ("rub it",))


@pytest.mark.parametrize("instructions", ['["a"]', '[1, "a"]', '"ab"', "{}"])
def test_a_line_with_faulty_instructions_is_named(tmp_path: Path, instructions: str) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text('{"prompt": "p", "answers": ["x", "y"], "instructions": ' + instructions + "}\n")
    with pytest.raises(InputError) as caught:
        read_pool(path)
    assert caught.value.where.startswith(f"{path}:1: instructions")


@pytest.mark.parametrize(
    ("answer", "is_repeated"),
    [
        ("The cold, CURT and impatient way.", True),
        ("Cold and curt, impatient way.", False),  # the words, but no three in a row
        ("in a cold", True),
        ("in a", False),
        ("", False),
    ],
)
def test_an_answer_repeats_an_instruction_with_three_of_its_words_in_a_row(answer: str, is_repeated: bool) -> None:
    assert repeats(answer, "Answer in a cold, curt and impatient way.") is is_repeated


def test_answers_that_repeat_their_own_instruction_make_no_pairs() -> None:
    answers = ("Glad to help!", "Answer in a warm way, my friend!", "Whatever.", "In a cold way, whatever.")
    own = (None, "Answer in a warm way.", "Answer in a cold way.", "Answer in a cold way.")
    sampled = Sampled("wash", answers, own)
    assert sampled.without_echoes() == ("Glad to help!", "Whatever.")
    assert Sampled("wash", answers).without_echoes() == answers
    catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
    (pair,) = label_pool([sampled], "friendly", catalogue)
    assert (pair["chosen"], pair["rejected"]) == ("Glad to help!", "Whatever.")
