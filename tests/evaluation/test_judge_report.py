"""A judge's biases and its agreement with people, against figures counted by hand."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from personalized_soups.declare.preference_data import Verdict
from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.evaluation.human_comparisons import read_human_comparisons
from personalized_soups.evaluation.judge_report import HumanComparison, agreement, judge_report
from personalized_soups.evaluation.win_rates import bootstrap_interval, ratio_interval
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement

FIRST, SECOND, TIE = (Judgement.of_gap(gap) for gap in (1.0, -1.0, 0.0))
UNPARSED = Judgement.of_orders("unparsed", "first")
POSITION = Judgement.of_orders("first", "second")  # named what was shown first, twice


def compared(first: str = "Yes.", second: str = "Certainly.", prompt: str = "Why?") -> ComparedAnswers:
    return ComparedAnswers(prompt, first, second)


def test_the_counts_and_biases() -> None:
    judgements = [FIRST, SECOND, SECOND, TIE, POSITION, UNPARSED]
    report = judge_report([compared()] * 5 + [compared("Certainly.", "Yes.")], judgements)
    assert report.counts == {"first": 1, "second": 2, "tie": 2, "unparsed": 1}
    # of the verdicts for one answer: 1 of 2, 1 of 2, 1 of 2, none of 0, 2 of 2, none of 1 name the first shown
    assert report.first_shown is not None
    assert report.first_shown.value == pytest.approx(5 / 9)
    assert report.first_shown.num == 9
    assert report.flipped is not None
    assert report.flipped.value == pytest.approx(1 / 5)
    assert report.flipped.num == 5
    assert report.longer is not None
    assert report.longer.value == pytest.approx(2 / 3)
    assert report.longer.num == 3


def test_nothing_decided_gives_no_share() -> None:
    report = judge_report([compared("Yes.", "Nay.")], [UNPARSED])
    assert (report.flipped, report.longer) == (None, None)
    human = HumanComparison(compared(), "tie")
    agreed = agreement([human], [TIE])
    assert (agreed.accuracy, agreed.credit, agreed.longer, agreed.kappa) == (None, None, None, None)


def test_agreement_with_people() -> None:
    preferred: list[Verdict] = ["first", "first", "second", "second", "tie", "second"]
    people = [HumanComparison(compared(), verdict) for verdict in preferred]
    agreed = agreement(people, [FIRST, SECOND, SECOND, TIE, TIE, UNPARSED])
    assert agreed.accuracy is not None
    assert agreed.accuracy.value == pytest.approx(2 / 3)
    assert agreed.accuracy.num == 3
    assert agreed.credit is not None
    assert agreed.credit.value == pytest.approx((1 + 0 + 1 + 0.5 + 0.5) / 5)
    assert agreed.credit.num == 5
    assert agreed.longer is not None
    assert agreed.longer.value == pytest.approx(3 / 5)  # the second answer is longer
    # five parsed: observed 3/5; people 2/5, 2/5, 1/5; judge 1/5, 2/5, 2/5
    expected = 2 / 5 * 1 / 5 + 2 / 5 * 2 / 5 + 1 / 5 * 2 / 5
    assert agreed.kappa == pytest.approx((3 / 5 - expected) / (1 - expected))


def test_a_judge_that_answers_at_random_has_no_kappa_and_half_the_credit() -> None:
    rng = random.Random(0)
    people = [HumanComparison(compared(prompt=str(n)), rng.choice(["first", "second"])) for n in range(4000)]
    agreed = agreement(people, [rng.choice([FIRST, SECOND]) for _ in people])
    # four standard deviations of a share of 4,000 fair coins
    assert agreed.kappa == pytest.approx(0.0, abs=2 * 4 * 0.5 / 4000**0.5)
    assert agreed.credit is not None
    assert agreed.credit.low < 0.5 < agreed.credit.high or abs(agreed.credit.value - 0.5) < 4 * 0.5 / 4000**0.5


def test_comparisons_of_one_prompt_are_resampled_together() -> None:
    # ten prompts with one hundred equal comparisons each hold as much as ten comparisons
    wins = [1.0] * 5 + [0.0] * 5
    many = ratio_interval([100 * win for win in wins], [100.0] * 10)
    assert many == pytest.approx(bootstrap_interval(wins))
    assert many[1] - many[0] > 0.4
    people = [HumanComparison(compared(prompt=str(n // 100)), "first") for n in range(1000)]
    agreed = agreement(people, [FIRST if n < 500 else SECOND for n in range(1000)])
    assert agreed.accuracy is not None
    assert agreed.accuracy.high - agreed.accuracy.low > 0.4


@pytest.mark.parametrize(("parts", "wholes"), [([], []), ([0.0], [0.0]), ([1.0], [1.0, 1.0])])
def test_a_ratio_without_cases_is_rejected(parts: list[float], wholes: list[float]) -> None:
    with pytest.raises(ValueError, match="give no ratio"):
        ratio_interval(parts, wholes)


def test_comparisons_in_json_lines(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Why?", "first": "a", "second": "b", "preferred": "second"},
        {"prompt": "Who?", "first": "a", "second": "b", "preferred": "tie", "criterion": "Brief"},
    ]
    path = tmp_path / "people.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert read_human_comparisons(path, criterion="Kind") == [
        HumanComparison(ComparedAnswers("Why?", "a", "b", "Kind"), "second"),
        HumanComparison(ComparedAnswers("Who?", "a", "b", "Brief"), "tie"),
    ]


def test_feedback_of_fine_grained_rlhf(tmp_path: Path) -> None:
    entry = {
        "question": "Who wrote it?",
        "passages": [["Title", "Ada wrote it.", "In 1843."], ["Other", "Nobody knows."]],
        **{f"prediction {number}": f"answer {number}" for number in range(1, 5)},
        "preference": [0, 1, 2, 1, 0, 2],
    }
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([entry]))
    found = read_human_comparisons(path)
    assert [(human.answers.first[-1], human.answers.second[-1]) for human in found] == list(
        itertools.combinations("1234", 2)
    )
    assert [human.preferred for human in found] == ["tie", "first", "second", "first", "tie", "second"]
    assert (
        found[0].answers.prompt == "Who wrote it?\n\nAnswer from these passages:\nAda wrote it. In 1843.\nNobody knows."
    )


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        ('{"prompt": "Why?"}', ":1", "'first' is missing"),
        ('{"prompt": "p", "first": 1, "second": "b", "preferred": "tie"}', ":1", "must be texts"),
        ('{"prompt": "p", "first": "a", "second": "b", "preferred": "left"}', ":1", "preferred is 'left'"),
        ("\n7", ":2", "not a comparison"),
        ("{", ":1", "not a comparison"),
        ("[", "", "not JSON"),
        ('[{"question": "q"}]', "entry 0", "'passages' is missing"),
        ("[7]", "entry 0", "not one of Fine-Grained"),
    ],
)
def test_other_contents_are_rejected_with_their_place(content: str, place: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "people.json"
    path.write_text(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_human_comparisons(path)
    assert caught.value.where.startswith(str(path))
    assert caught.value.where.endswith(place)


@pytest.mark.parametrize("content", [b"", b"\n", b"[]", b"\xff\xfe"])
def test_files_without_comparisons_are_rejected(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "people.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_human_comparisons(path)
    with pytest.raises(InputError):
        read_human_comparisons(tmp_path / "missing.json")
