"""Labels of answers by a scorer or a judge, files of labels, and pairs from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.preference_data import LabelledAnswers, LabelledComparison, Verdict
from personalized_soups.errors import DeclarationError, InputError, OutputExistsError, RunError, UsageError
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement
from personalized_soups.scoring.scorers import length_scorer
from personalized_soups.training import labelling
from personalized_soups.training.data import read_preferences, write_pairs
from personalized_soups.training.labelling import LabelRequest
from personalized_soups.training.labels import JudgeLabels, ScorerLabels, read_labels
from personalized_soups.training.pairs import choose_pairs, label_pool, tied_pairs
from personalized_soups.training.rollouts import Sampled, write_pool

CATALOGUE = Catalogue.model_validate_json(
    """{"dimensions": {"informativeness": {"about": "length", "scorer": {"kind": "length", "low": 0, "high": 10},
        "sides": {"concise": {"label": "P2A", "instruction": "Be brief.", "end": "low"},
                  "informative": {"label": "P2B", "instruction": "Tell all."}}}}}"""
)


def words(count: int) -> str:
    return " ".join(["word"] * count)


class ShorterJudge:
    """Prefers the answer with fewer words. It fails at a prompt called `fails`."""

    def __init__(self) -> None:
        self.seen: list[ComparedAnswers] = []

    @property
    def settings(self) -> dict[str, object]:
        return {"kind": "test"}

    def compare(
        self, comparisons: Sequence[ComparedAnswers], *, on_done: Callable[[int], None] | None = None
    ) -> list[Judgement]:
        if any(each.prompt == "fails" for each in comparisons):
            raise RunError("the endpoint is down", where="test", mend="start it")
        self.seen += comparisons
        return [Judgement.of_gap(len(each.second.split()) - len(each.first.split())) for each in comparisons]


def test_a_scorer_labels_each_answer() -> None:
    labels = ScorerLabels("concise", length_scorer(low=0, high=10), "low")
    line = labels.of(Sampled("Why?", (words(2), "...", words(9))))
    assert line.answers == (words(2), "...", words(9))
    assert list(line.scores) == [0.8, None, 1 - 0.9]
    echoed = Sampled("Why?", ("I will answer in a few words.", "Yes."), ("Answer in a few words.", None))
    assert labels.of(echoed).answers == ("Yes.",)
    cut = ScorerLabels("concise", length_scorer(low=0, high=10), "low", whole_sentences=True)
    assert cut.of(Sampled("Why?", ("It rains. Then the",))).answers == ("It rains.",)


@pytest.mark.parametrize(("num", "expected"), [(None, 2), (1, 1), (3, 3), (99, 6)])
def test_a_judge_compares_as_many_pairs_as_asked(num: int | None, expected: int) -> None:
    judge = ShorterJudge()
    sampled = Sampled("Why?", tuple(words(count) for count in (1, 2, 3, 4)))
    (line,), compared = JudgeLabels("concise", judge, "Be brief.", num).of([sampled])
    places = [frozenset((each.first, each.second)) for each in line.comparisons]
    assert len(places) == len(set(places)) == len(compared) == expected
    if num is None:
        assert frozenset.union(*places) == {0, 1, 2, 3}  # each answer once
    for each in line.comparisons:
        assert each.verdict == ("first" if each.first < each.second else "second")
    assert {each.criterion for each in judge.seen} == {"Be brief."}


def test_equal_answers_are_not_compared() -> None:
    sampled = Sampled("Why?", ("same", "same", "other one"))
    (line,), _ = JudgeLabels("concise", ShorterJudge(), "Be brief.", 99).of([sampled])
    assert len(line.comparisons) == 2
    (line,), _ = JudgeLabels("concise", ShorterJudge(), "Be brief.").of([Sampled("Why?", ("same", "same"))])
    assert line.comparisons == ()


def test_the_order_in_which_answers_are_shown_is_drawn() -> None:
    pool = [Sampled(str(number), (words(1), words(2))) for number in range(64)]
    lines, _ = JudgeLabels("concise", ShorterJudge(), "Be brief.").of(pool)
    shown_first = sum(line.comparisons[0].first for line in lines)
    assert abs(shown_first - 32) < 4 * 4  # four standard deviations of 64 fair coins
    assert JudgeLabels("concise", ShorterJudge(), "Be brief.").of(pool)[0] == lines
    assert JudgeLabels("concise", ShorterJudge(), "Be brief.", seed=1).of(pool)[0] != lines


def line(prompt: str, *verdicts: Verdict) -> LabelledAnswers:
    answers = tuple(f"{prompt} {number}" for number in range(2 * len(verdicts)))
    return LabelledAnswers(
        prompt=prompt,
        side="concise",
        answers=answers,
        comparisons=tuple(
            LabelledComparison(first=2 * at, second=2 * at + 1, verdict=verdict) for at, verdict in enumerate(verdicts)
        ),
    )


def test_comparisons_with_a_winner_are_pairs_and_ties_are_kept_apart() -> None:
    labels = [line("a", "first", "tie"), line("b", "second", "unparsed")]
    pairs = choose_pairs(labels)
    assert sorted((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs) == [
        ("a", "a 0", "a 1"),
        ("b", "b 1", "b 0"),
    ]
    assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    assert [(pair["chosen"], pair["rejected"]) for pair in tied_pairs(labels)] == [("a 2", "a 3"), ("a 3", "a 2")]
    assert tied_pairs(labels, conversational=True)[0]["chosen"] == [{"role": "assistant", "content": "a 2"}]
    assert len(choose_pairs(labels, max_pairs=1)) == 1


def test_it_is_said_why_there_is_no_pair() -> None:
    with pytest.raises(InputError, match="no comparison has a winner: 2 are ties, and 1 have no verdict"):
        choose_pairs([line("a", "tie", "tie"), line("b", "unparsed")])


def test_the_two_ways_to_pairs_give_the_same(tmp_path: Path) -> None:
    pool = [Sampled(str(number), tuple(words(1 + (7 * number + at) % 10) for at in range(4))) for number in range(20)]
    write_pool(tmp_path / "rollouts.jsonl", pool)
    request = LabelRequest(tmp_path / "rollouts.jsonl", "informative", CATALOGUE)
    assert request.num_prompts() == 20
    assert request.write(tmp_path / "labels.jsonl") == []
    chosen = choose_pairs(read_labels(tmp_path / "labels.jsonl"), seed=3, max_pairs=15)
    assert chosen == label_pool(pool, "informative", CATALOGUE, seed=3, max_pairs=15)
    write_pairs(tmp_path / "pairs.jsonl", chosen)
    assert len(read_preferences(tmp_path / "pairs.jsonl").pairs) == 15


def test_a_failing_judge_loses_nothing_and_the_rest_is_labelled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelling, "_PORTION", 2)
    prompts = ["a", "b", "c", "fails", "d"]
    rollouts, out = tmp_path / "rollouts.jsonl", tmp_path / "labels.jsonl"
    write_pool(rollouts, [Sampled(prompt, (words(1), words(2))) for prompt in prompts])
    judge = ShorterJudge()
    with pytest.raises(RunError, match="the endpoint is down"):
        LabelRequest(rollouts, "concise", CATALOGUE, judge).write(out)
    assert [each.prompt for each in read_labels(out)] == ["a", "b"]

    class Mended(ShorterJudge):
        def compare(
            self, comparisons: Sequence[ComparedAnswers], *, on_done: Callable[[int], None] | None = None
        ) -> list[Judgement]:
            self.seen += comparisons
            return [Judgement.of_gap(1.0) for _ in comparisons]

    mended, done = Mended(), list[int]()
    with pytest.raises(UsageError, match="differ: num_comparisons"):
        LabelRequest(rollouts, "concise", CATALOGUE, mended, num_comparisons=1).write(out)
    compared = LabelRequest(rollouts, "concise", CATALOGUE, mended).write(out, on_done=done.append)
    assert [each.prompt for each in mended.seen] == [each.prompt for each, _ in compared] == ["c", "fails", "d"]
    assert done == [4, 5]
    assert [each.prompt for each in read_labels(out)] == prompts
    with pytest.raises(OutputExistsError):
        LabelRequest(rollouts, "concise", CATALOGUE, mended).write(out)


def test_a_repeated_prompt_and_an_empty_file_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_pool(path, [Sampled("a", ("x", "y")), Sampled("b", ("x", "y")), Sampled("a", ("z", "y"))])
    with pytest.raises(InputError, match="prompt 3 of the file repeats prompt 1: 'a'"):
        LabelRequest(path, "concise", CATALOGUE).num_prompts()
    path.write_text("\n")
    with pytest.raises(InputError, match="empty"):
        LabelRequest(path, "concise", CATALOGUE).num_prompts()


GOOD = {"prompt": "Why?", "side": "concise", "answers": ["x", "y"], "scores": [0.5, None]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.5]}, "2 answers, but 1 scores"),
        ({"scores": ["high", None]}, "scores"),
        ({"comparisons": [{"first": 0, "second": 2, "verdict": "tie"}]}, "answers 0 and 2"),
        ({"comparisons": [{"first": 1, "second": 1, "verdict": "tie"}]}, "two different answers"),
        ({"comparisons": [{"first": 0, "second": 1, "verdict": "both"}]}, "verdict"),
        ({"side": "friendly"}, "the first line is for 'concise'"),
        ({"scores": [], "comparisons": [{"first": 0, "second": 1, "verdict": "tie"}]}, "mixes lines"),
        ({"prompt": " "}, "prompt"),
        ({"answer": "x"}, "answer"),
    ],
)
def test_a_faulty_line_is_named(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | changes) + "\n")
    with pytest.raises(DeclarationError) as caught:
        read_labels(path)
    assert caught.value.where.startswith(f"{path}:3")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b'{"prompt": "\xff"}', "not UTF-8"), (b"[]", "holds a list")]
)
def test_other_files_are_rejected(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_labels(path)
    with pytest.raises(DeclarationError, match="cannot be read"):
        read_labels(tmp_path / "missing.jsonl")
