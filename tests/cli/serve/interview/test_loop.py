"""Interviews with scripted users: every key, resuming, and what is told of the answers."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

from personalized_soups.cli.serve.interview.commands import choice_of, command_of
from personalized_soups.cli.serve.interview.keyboard import LineKeyboard
from personalized_soups.cli.serve.interview.loop import Ending, Interview
from personalized_soups.cli.serve.interview.person import Person
from personalized_soups.declare.evidence import AnsweredQuestion
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import RunError
from personalized_soups.users.answers.session import InferenceSession
from personalized_soups.users.answers.stopping import StoppingRule
from tests.cli.serve.interview.pools import DIMENSIONS, pool_of

RULE = SideRule(DIMENSIONS)


class Recorded:
    """A log that records every call, and the answers that a store would hold after it."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.kept: list[AnsweredQuestion] = []
        self.calls: list[str] = []
        self._fail_at = fail_at

    def add(self, answered: AnsweredQuestion) -> None:
        if len(self.kept) == self._fail_at:
            raise RunError("no", where="log", mend="none")
        self.calls.append("add")
        self.kept.append(answered)

    def undo(self) -> None:
        self.calls.append("undo")
        self.kept.pop()


def _session(max_questions: int = 4) -> InferenceSession:
    return InferenceSession(pool_of(12), "ada", stopping=StoppingRule(max_questions))


def _run(
    session: InferenceSession, keys: str, log: Recorded | None = None
) -> tuple[InferenceSession, Ending, str, Recorded]:
    shown: list[str] = []
    log = Recorded() if log is None else log
    keyboard = LineKeyboard(io.StringIO("".join(f"{key}\n" for key in keys)))
    after, ending = Interview(Person(keyboard, shown.append), log, RULE, shown.append, lambda: 80).run(session)
    return after, ending, "\n".join(shown), log


def test_choices_refer_to_the_question_regardless_of_the_order_in_which_the_answers_are_shown() -> None:
    assert [choice_of(key, swapped=False) for key in ("A", "B", "tie", "skip")] == ["a", "b", "tie", "skip"]
    assert [choice_of(key, swapped=True) for key in ("A", "B", "tie", "skip")] == ["b", "a", "tie", "skip"]
    for swapped in (False, True):
        for key in ("A", "B", "tie", "skip"):
            assert command_of(choice_of(key, swapped=swapped), swapped=swapped) == key


def test_every_answer_is_stored_as_it_was_shown() -> None:
    after, ending, text, log = _run(_session(), "abts")
    assert ending == "done"
    assert log.kept == list(after.answers)
    assert [each.answer.choice for each in log.kept[2:]] == ["tie", "skip"]
    for number, (key, answered) in enumerate(zip("ab", log.kept, strict=False), start=1):
        shown = text.split(f"question {number} of 4")[1]
        above, below = shown.index(answered.question.a), shown.index(answered.question.b)
        assert (above < below) == (not answered.answer.swapped)
        best = answered.question.a if answered.answer.choice == "a" else answered.question.b
        assert (best == (answered.question.a if above < below else answered.question.b)) == (key == "a")
    assert [f"question {number} of 4" in text for number in (1, 4, 5)] == [True, True, False]


def test_back_asks_the_same_question_again() -> None:
    session = _session()
    after, ending, text, log = _run(session, "akb")
    assert ending == "end of input"
    assert log.calls == ["add", "undo", "add"]
    assert after.num_asked == 1
    assert after.answers[0].question == session.answered(session.next.question.id, "a").answers[0].question  # type: ignore[union-attr]
    assert text.count("question 1 of 4") == 2
    assert "the last answer is taken back" in text


def test_back_before_the_first_answer_changes_nothing() -> None:
    after, ending, text, log = _run(_session(), "kq")
    assert (after.num_asked, ending, log.calls) == (0, "quit", [])
    assert "there is no answer to take back" in text


def test_unknown_keys_are_told_and_asked_again() -> None:
    after, _, text, log = _run(_session(), ["x", "", "yes", "?", "A", "q"])  # type: ignore[arg-type]
    assert (after.num_asked, log.calls) == (1, ["add"])
    assert "'x' is not one of the keys" in text
    assert "'yes' is not one of the keys" in text
    assert "'' is not" not in text
    assert "take back the last answer" in text  # the help
    assert text.count("question 1 of 4") == 1


def test_an_interview_continues_where_it_was_left() -> None:
    whole, *_ = _run(_session(), "abab")
    first, ending, _, log = _run(_session(), "abq")
    assert (ending, len(log.kept)) == ("quit", 2)
    resumed = replace(_session(), answers=tuple(log.kept))
    second, ending, text, _ = _run(resumed, "ab")
    assert ending == "done"
    assert "question 3 of 4" in text
    assert [each.question for each in second.answers] == [each.question for each in whole.answers]
    np.testing.assert_array_equal(second.estimate.mean, whole.estimate.mean)
    assert first.num_asked == 2


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ("aaaaaaaa", "You chose the first answer all 6 times."),
        ("bbbbbbbb", "You chose the second answer all 6 times."),
        ("tststsss", "You chose neither answer in all 6 questions"),
    ],
)
def test_answers_that_say_little_are_told_once(keys: str, note: str) -> None:
    *_, text, _ = _run(_session(8), keys)
    assert text.count("note:") == 1
    assert f"note: {note}" in text


def test_an_answer_that_cannot_be_stored_ends_the_interview() -> None:
    log = Recorded(fail_at=2)
    with pytest.raises(RunError):
        _run(_session(), "abab", log)
    assert len(log.kept) == 2


def test_after_each_answer_the_preferences_so_far_are_shown() -> None:
    *_, text, _ = _run(_session(), "ab")
    lines = [line for line in text.split("\n") if line.startswith("so far")]
    assert len(lines) == 2
    assert all("of 10 of your choices" in line for line in lines)
