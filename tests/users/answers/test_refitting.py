from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from personalized_soups.declare.evidence import Answer, AnsweredQuestion, Choice, Question
from personalized_soups.errors import UsageError
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.bounded_rewards import BoundedRewards
from personalized_soups.users.answers.refitting import pool_of_answers
from personalized_soups.users.answers.session import InferenceSession


class Lengths:
    """Two rewards: the length of the answer, and the length of the prompt and the answer."""

    names = ("answer", "both")
    digest = "lengths"

    def features(self, items: Sequence[TextItem], /) -> npt.NDArray[np.float64]:
        return np.array([[len(item.answer), len(item.prompt) + len(item.answer)] for item in items], dtype=np.float64)


def _answered(number: int, a: str, b: str, choice: Choice) -> AnsweredQuestion:
    name = f"q{number}"
    return AnsweredQuestion(
        question=Question(id=name, prompt="p" * number, a=a, b=b), answer=Answer(question=name, choice=choice)
    )


ANSWERS = (_answered(1, "aaaa", "b", "a"), _answered(2, "a", "bbb", "b"), _answered(3, "aa", "bbbbb", "skip"))


def test_the_stored_questions_get_the_new_rewards() -> None:
    pool = pool_of_answers(ANSWERS, Lengths())
    assert pool.questions == tuple(each.question for each in ANSWERS)
    assert pool.names == ("answer", "both")
    # bounded by the median of the six answers and the distance within which 70% of them are
    lengths = np.array([[4, 5], [1, 2], [1, 3], [3, 5], [2, 5], [5, 8]], dtype=np.float64)
    centres = np.median(lengths, axis=0)
    scales = np.quantile(np.abs(lengths - centres), 0.7, axis=0)
    squashed = np.tanh((lengths - centres) / scales)
    np.testing.assert_allclose(pool.a, squashed[0::2], rtol=1e-6)
    np.testing.assert_allclose(pool.b, squashed[1::2], rtol=1e-6)
    items = [TextItem("p", "aaaa")]
    np.testing.assert_allclose(pool.rewards(Lengths()).features(items), squashed[:1], rtol=1e-6)
    assert pool.record.digest == BoundedRewards(Lengths(), centres=centres, scales=scales).digest


def test_the_prior_has_margins_of_a_typical_size() -> None:
    pool = pool_of_answers(ANSWERS, Lengths())
    variances = [difference @ pool.prior.covariance @ difference for difference in pool.differences]
    assert np.mean(variances) == pytest.approx(16.0)
    np.testing.assert_array_equal(pool.prior.mean, [0, 0])


def test_a_session_with_the_answers_has_no_further_question() -> None:
    session = InferenceSession(pool_of_answers(ANSWERS, Lengths()), "ada", ANSWERS)
    assert session.is_done
    assert session.estimate.num_answers == 2  # without the skipped question
    assert (session.estimate.mean > 0).all()  # the user chose the longer answer twice


def test_answers_without_any_difference_are_refused() -> None:
    with pytest.raises(UsageError, match="there are no answers"):
        pool_of_answers((), Lengths())
    with pytest.raises(UsageError, match="equal in every question"):
        pool_of_answers((_answered(1, "aa", "bb", "a"),), Lengths())
