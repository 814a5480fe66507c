"""A session: the questions of one user, the answers, and the states between them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from personalized_soups.declare.evidence import Answer, AnsweredQuestion, Choice, Question
from personalized_soups.errors import UsageError
from personalized_soups.users.answers.pool import PoolRecord, QuestionPool
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.propagation import propagate
from personalized_soups.users.answers.session import POSITION_DEVIATION, InferenceSession
from personalized_soups.users.answers.stopping import StoppingRule

NAMES = ("concise", "friendly", "informative", "unfriendly")
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def make_pool(num_questions: int = 24, *, seed: int = 0) -> QuestionPool:
    rng = np.random.default_rng(seed)
    questions = tuple(
        Question(id=f"q{number}", prompt=f"prompt {number % 8}", a=f"answer a{seed}", b="answer b")
        for number in range(num_questions)
    )
    a, b = rng.normal(size=(2, num_questions, 4)).astype(np.float32)
    return QuestionPool(PoolRecord(names=NAMES, digest="0"), questions, a, b, GaussianPrior.ridge(4))


POOL = make_pool()


def answer_all(session: InferenceSession, weights: np.ndarray) -> InferenceSession:
    while (shown := session.next) is not None:
        margin = float(POOL.differences[POOL.index(shown.question.id)] @ weights)
        session = session.answered(shown.question.id, "a" if margin > 0 else "b", at=NOW)
    return session


def test_ten_answers_give_the_weights_and_a_preference_for_a_position() -> None:
    session = answer_all(InferenceSession(POOL, "ada"), np.array([1.0, 2.0, -1.0, -2.0]))
    assert (session.num_asked, session.is_done, session.next) == (10, True, None)
    differences = POOL.differences[[POOL.index(each.question.id) for each in session.answers]]
    first = [-1.0 if each.answer.swapped else 1.0 for each in session.answers]
    labels = [1.0 if each.answer.choice == "a" else 0.0 for each in session.answers]
    prior = GaussianPrior(np.zeros(5), np.diag([1.0, 1.0, 1.0, 1.0, POSITION_DEVIATION**2]))
    expected = propagate(np.column_stack([differences, first]), labels, prior)
    np.testing.assert_allclose(session.estimate.mean, expected.mean[:4], rtol=1e-12)
    np.testing.assert_allclose(session.estimate.covariance, expected.covariance[:4, :4], rtol=1e-12)
    assert session.estimate.mean[1] > session.estimate.mean[3]
    assert session.agreement > InferenceSession(POOL, "ada").agreement == pytest.approx(0.5)


def test_users_who_always_choose_one_position_stay_uncertain() -> None:
    """Over 40 users: the position explains the answers, so less is expected than of users with a taste."""
    expected: dict[str, list[float]] = {"position": [], "taste": []}
    for number in range(40):
        session = InferenceSession(POOL, f"u{number}")
        weights = 3 * np.random.default_rng(number).normal(size=4)
        expected["taste"].append(answer_all(session, weights).agreement)
        while (shown := session.next) is not None:
            session = session.answered(shown.question.id, "b" if shown.swapped else "a", at=NOW)
        expected["position"].append(session.agreement)
        assert "chose the first answer all 10 times" in session.notes()[0]
    assert np.mean(expected["position"]) < np.mean(expected["taste"]) - 0.03


def test_a_session_that_is_made_again_from_its_answers_asks_the_same_question() -> None:
    session = InferenceSession(POOL, "ada")
    for choice in ("a", "tie", "skip", "b"):
        shown = session.next
        assert shown is not None
        session = session.answered(shown.question.id, choice, at=NOW)
        again = InferenceSession(POOL, "ada", session.answers)
        assert again.next == session.next
        np.testing.assert_array_equal(again.estimate.mean, session.estimate.mean)


def test_taking_an_answer_back_asks_the_question_again() -> None:
    first = InferenceSession(POOL, "ada")
    shown = first.next
    assert shown is not None
    second = first.answered(shown.question.id, "a")
    assert second.next != shown
    assert second.undone().next == shown
    assert second.undone().answers == ()
    with pytest.raises(UsageError, match="no answer to take back"):
        first.undone()


def test_a_skipped_question_is_not_asked_again_and_tells_nothing() -> None:
    session = InferenceSession(POOL, "ada", stopping=StoppingRule(max_questions=24))
    seen = []
    while (shown := session.next) is not None:
        seen.append(shown.question.id)
        session = session.answered(shown.question.id, "skip")
    assert sorted(seen) == sorted(question.id for question in POOL.questions)
    np.testing.assert_array_equal(session.estimate.mean, POOL.prior.mean)
    assert session.estimate.num_answers == 0
    assert "neither answer" in session.notes()[0]


def test_answers_are_shown_in_both_orders_and_users_get_different_orders() -> None:
    orders = {}
    for user in ("ada", "bob"):
        session = InferenceSession(POOL, user, stopping=StoppingRule(max_questions=24))
        shown_orders = {}
        while (shown := session.next) is not None:
            shown_orders[shown.question.id] = shown.swapped
            session = session.answered(shown.question.id, "skip")
        orders[user] = shown_orders
        # 24 fair coins: fewer than 4 of one side happens once in 10,000 users
        assert 4 <= sum(shown_orders.values()) <= 20
    assert orders["ada"] != orders["bob"]


def test_the_stored_choice_is_that_of_the_question_not_of_the_position() -> None:
    session = InferenceSession(POOL, "ada")
    shown = session.next
    assert shown is not None
    answered = session.answered(shown.question.id, "a", at=NOW).answers[-1]
    assert answered == AnsweredQuestion(
        question=shown.question,
        answer=Answer(question=shown.question.id, choice="a", swapped=shown.swapped, answered_at=NOW),
    )


def test_a_question_that_was_not_asked_or_was_answered_is_rejected() -> None:
    session = InferenceSession(POOL, "ada")
    shown = session.next
    assert shown is not None
    other = next(question.id for question in POOL.questions if question.id != shown.question.id)
    with pytest.raises(UsageError, match=f"'{other}' was not asked"):
        session.answered(other, "a")
    with pytest.raises(UsageError, match=f"'{shown.question.id}' was already answered"):
        session.answered(shown.question.id, "a").answered(shown.question.id, "b")


def test_answers_to_another_pool_are_rejected_with_the_fix() -> None:
    session = answer_all(InferenceSession(POOL, "ada"), np.ones(4))
    with pytest.raises(UsageError, match="another pool") as caught:
        InferenceSession(make_pool(seed=1), "ada", session.answers)
    assert "refit" in caught.value.mend
    with pytest.raises(UsageError, match="two answers"):
        InferenceSession(POOL, "ada", (session.answers[0], session.answers[0]))


def test_a_certain_session_stops_before_its_budget() -> None:
    weights = np.array([1.0, 2.0, -1.0, -2.0])
    easy = StoppingRule(max_questions=24, certainty=0.75)
    session = answer_all(InferenceSession(POOL, "ada", stopping=easy), weights)
    assert 3 <= session.num_asked < 24
    assert session.agreement >= 0.75
    before = session.undone()
    assert before.num_asked < 3 or before.agreement < 0.75


def test_a_user_who_changes_is_followed_if_old_answers_are_forgotten() -> None:
    steady = InferenceSession(POOL, "ada", stopping=StoppingRule(max_questions=24))
    session, changed = steady, np.array([0.0, 1.0, 0.0, -1.0])
    while (shown := session.next) is not None:
        weights = changed if session.num_asked < 12 else -changed
        margin = float(POOL.differences[POOL.index(shown.question.id)] @ weights)
        choice: Choice = "a" if margin > 0 else "b"
        session = session.answered(shown.question.id, choice, at=NOW)
    forgetful = replace(session, forgetting_rate=0.3)
    strength = [each.estimate.mean[3] - each.estimate.mean[1] for each in (session, forgetful)]
    assert strength[1] > strength[0]
    assert strength[1] > 0
