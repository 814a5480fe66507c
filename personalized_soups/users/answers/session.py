"""`InferenceSession`: ask one user questions of a pool, and estimate the user's weights.

A session has no hidden state. The next question follows from the pool, the user's name and the answers so far. So a
terminal, a server and a resumed session ask the same questions, and a server can check that it asked the question to
which an answer arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Self

import numpy as np
from blake3 import blake3

from personalized_soups.declare.evidence import Answer, AnsweredQuestion, Choice, Question
from personalized_soups.errors import UsageError
from personalized_soups.users.answers.consistency import left_out_probability
from personalized_soups.users.answers.estimate import Estimate, forgetting
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.answers.prior import Floats, GaussianPrior
from personalized_soups.users.answers.propagation import propagate
from personalized_soups.users.answers.selection import Rule, next_question
from personalized_soups.users.answers.stopping import StoppingRule, expected_agreement
from personalized_soups.users.answers.wording import notes

# The standard deviation of a user's preference for a position, in units of the margin: half of the typical margin of a
# question (`pairing.TYPICAL_MARGIN`), because most users read both answers. Measured on the tiny base: 30 users who
# always choose the first answer get 1.5 clear preferences each without it, 0.13 with a deviation of 1, and none with 2.
# The agreement of users with a taste stays at 0.92.
POSITION_DEVIATION = 2.0


@dataclass(frozen=True, slots=True)
class ShownQuestion:
    """A question, and the order in which its answers are shown.

    Attributes:
        question: the question.
        swapped: whether `b` is shown first. The order is random, so a preference for a position adds no bias.
    """

    question: Question
    swapped: bool


@dataclass(frozen=True)
class InferenceSession:
    """The questions and answers of one user. Objects are frozen: `answered` and `undone` return the next state.

    Attributes:
        pool: the questions, with the base rewards of their answers.
        user: the user's name. It seeds the order of the answers and the random numbers of the rule.
        answers: the answers so far, in the order in which they were given.
        stopping: when to stop.
        rule: how the next question is chosen; see `selection.question_scores`.
        noise: the assumed probability that the user presses the wrong button; see `estimate_weights`.
        forgetting_rate: how fast old answers lose their effect; see `forgetting`.

    Raises:
        UsageError: if an answer belongs to a question that is not in the pool, or two answers to one question.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> pool = make_questions(model, ["How do I clean a lamp?"], num_questions=2)
        >>> session = InferenceSession(pool, "ada")
        >>> session = session.answered(session.next.question.id, "a")
        >>> session.num_asked, session.estimate.num_answers, session.is_done
        (1, 1, False)
    """

    pool: QuestionPool
    user: str
    answers: tuple[AnsweredQuestion, ...] = ()
    stopping: StoppingRule = field(default_factory=StoppingRule)
    rule: Rule = "prediction"
    noise: float = 0.0
    forgetting_rate: float = 0.0

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for answered in self.answers:
            question = answered.question
            if self._questions.get(question.id) != question:
                raise UsageError(
                    f"the answer to {question.id!r} belongs to another pool of questions, which was made with other "
                    "experts or another seed",
                    where=f"the answers of {self.user!r}",
                    mend="estimate the weights again with this pool's experts (refit), or delete the answers",
                )
            if question.id in seen:
                raise UsageError(
                    f"the question {question.id!r} has two answers",
                    where=f"the answers of {self.user!r}",
                    mend="keep one answer for each question",
                )
            seen.add(question.id)

    @cached_property
    def _questions(self) -> dict[str, Question]:
        return {question.id: question for question in self.pool.questions}

    @cached_property
    def asked(self) -> tuple[int, ...]:
        """The index in the pool of each answered or skipped question."""
        return tuple(self.pool.index(answered.question.id) for answered in self.answers)

    @property
    def num_asked(self) -> int:
        """The number of answered and skipped questions."""
        return len(self.answers)

    @cached_property
    def estimate(self) -> Estimate:
        """The estimate of the user's reward weights after all answers. Skipped questions do not count.

        Some users tend to choose the answer that is shown first, or second. So the margin of an answer has one more
        unknown, a preference for the first position, with the prior `N(0, POSITION_DEVIATION^2)`. It is estimated with
        the weights and then integrated out. If a user always chooses one position, this explains the answers, and the
        weights stay uncertain.
        """
        labels = [answered.answer.label for answered in self.answers]
        kept = [place for place, label in enumerate(labels) if label is not None]
        is_first = np.array([-1.0 if answered.answer.swapped else 1.0 for answered in self.answers])
        num = len(self.pool.prior.mean)
        covariance = np.zeros((num + 1, num + 1))
        covariance[:num, :num] = self.pool.prior.covariance
        covariance[num, num] = POSITION_DEVIATION**2
        joint = propagate(
            np.column_stack([self.answered_differences, is_first])[kept],
            [label for label in labels if label is not None],
            GaussianPrior(np.append(self.pool.prior.mean, 0.0), covariance),
            counts_N=forgetting(len(labels), self.forgetting_rate)[kept],
            noise=self.noise,
        )
        return Estimate(joint.mean[:num], joint.covariance[:num, :num], joint.num_answers)

    @property
    def answered_differences(self) -> Floats:
        """[N, D]: the differences of the answered and skipped questions."""
        return np.asarray(self.pool.differences[list(self.asked)], dtype=np.float64)

    @property
    def open_differences(self) -> Floats:
        """[Q - N, D]: the differences of the questions that were not asked."""
        return np.delete(self.pool.differences, list(self.asked), axis=0)

    @cached_property
    def agreement(self) -> float:
        """How often the estimate is expected to predict the preferred answer of a question that was not asked."""
        return expected_agreement(self.estimate, self.open_differences)

    @cached_property
    def is_done(self) -> bool:
        """Whether enough questions were asked, or none are left."""
        if self.num_asked >= len(self.pool.questions):
            return True
        return self.stopping.is_done(self.estimate, self.open_differences, num_asked=self.num_asked)

    @cached_property
    def next(self) -> ShownQuestion | None:
        """The next question, or None if the session is done."""
        if self.is_done:
            return None
        index = next_question(
            self.estimate,
            self.pool.differences,
            asked=self.asked,
            prompts=[question.prompt for question in self.pool.questions],
            rule=self.rule,
            rng=np.random.default_rng(_seed(self.user, str(self.num_asked))),
        )
        assert index is not None
        question = self.pool.questions[index]
        return ShownQuestion(question, swapped=bool(_seed(self.user, question.id) % 2))

    def answered(self, question: str, choice: Choice, *, at: datetime | None = None) -> Self:
        """Return the session after an answer to the current question.

        Args:
            question: the id of the question.
            choice: `a` and `b` are the answers of the question, regardless of the order in which they were shown.
            at: the time of the answer. The default is now.

        Raises:
            UsageError: if the question is not the current one.
        """
        current = self.next
        if current is None or current.question.id != question:
            was_answered = any(answered.question.id == question for answered in self.answers)
            state = "was already answered" if was_answered else "was not asked"
            raise UsageError(
                f"the question {question!r} {state}",
                where="question",
                mend="answer the current question" if current is not None else "the session is done; read the estimate",
            )
        answer = Answer(
            question=question, choice=choice, swapped=current.swapped, answered_at=at or datetime.now(tz=UTC)
        )
        return self._with((*self.answers, AnsweredQuestion(question=current.question, answer=answer)))

    def undone(self) -> Self:
        """Return the session without its last answer.

        Raises:
            UsageError: if there is no answer.
        """
        if not self.answers:
            raise UsageError("there is no answer to take back", where="answers", mend="answer the current question")
        return self._with(self.answers[:-1])

    def notes(self) -> list[str]:
        """Return warnings about the answers; see `wording.notes`."""
        answers = [answered.answer for answered in self.answers]
        decided = [place for place, answer in enumerate(answers) if answer.label in {0.0, 1.0}]
        if not decided:
            return notes(answers, 0.5)
        labels = [answers[place].label == 1 for place in decided]
        return notes(answers, left_out_probability(self.answered_differences[decided], labels, self.pool.prior))

    def _with(self, answers: Sequence[AnsweredQuestion]) -> Self:
        return type(self)(
            self.pool, self.user, tuple(answers), self.stopping, self.rule, self.noise, self.forgetting_rate
        )


def _seed(*parts: str) -> int:
    return int.from_bytes(blake3("\0".join(parts).encode()).digest(length=8), "little")
