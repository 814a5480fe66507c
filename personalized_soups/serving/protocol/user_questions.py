"""`UserQuestions`: asks users the questions of a pool, stores their answers, and estimates their profiles."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from personalized_soups.adapters.library import Expert
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.evidence import AnsweredQuestion, Choice
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import SoupError, UsageError
from personalized_soups.scoring.expert_digests import expert_digest
from personalized_soups.serving.protocol.faults import ApiError
from personalized_soups.serving.protocol.question_bodies import (
    EstimateBody,
    PreferenceBody,
    QuestionBody,
    QuestionsState,
    ShownChoice,
)
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.answers.preferences import preferences_of
from personalized_soups.users.answers.profile import profile_of
from personalized_soups.users.answers.session import InferenceSession
from personalized_soups.users.answers.stopping import StoppingRule
from personalized_soups.users.answers.wording import summary
from personalized_soups.users.profiles.failures import AnsweredOtherwise, AnswersChanged
from personalized_soups.users.profiles.store import ProfileStore

_log = logging.getLogger(__name__)

# How often a request is repeated if another request of the same user changes the answers at the same time.
_ATTEMPTS = 5


class UserQuestions:
    """Asks the questions of a pool. Nothing is kept between two calls: the answers are in the store.

    All methods block while they read or write the store.

    Args:
        pool: the questions.
        store: the store of the users' answers.
        stopping: when to stop asking.
        catalogue: the dimensions of experts that do not record their own.

    Raises:
        UsageError: if the pool's rewards are not those of experts, so that they give no profile.
    """

    def __init__(
        self, pool: QuestionPool, store: ProfileStore, stopping: StoppingRule, catalogue: Catalogue | None = None
    ) -> None:
        experts = [expert.name for expert in pool.record.experts]
        if list(pool.names) != experts:
            raise UsageError(
                f"the rewards of the questions are {', '.join(pool.names)}, which are not the rewards of experts, so "
                "answers give no profile",
                where=str(pool.folder or "questions"),
                mend="make questions with the experts that are served: psoups questions make",
            )
        self._pool = pool
        self._store = store
        self._stopping = stopping
        self._rule = _side_rule(pool, catalogue)
        self._fault: str | None = None

    def use_experts(self, experts: Mapping[str, Expert]) -> None:
        """Compare the served experts with those of the pool. Call it at the start and when the experts have changed.

        If they differ, no questions are asked until the next call.
        """
        pooled = [expert.name for expert in self._pool.record.experts]
        try:
            self._pool.check_experts({name: expert_digest(experts[name].folder) for name in pooled if name in experts})
        except SoupError as error:
            _log.error("no questions can be asked: %s; %s", error.what, error.mend)
            # The log names the folder of the questions. Responses must not contain folders of this machine.
            what = error.what if isinstance(error, UsageError) else "the files of an expert cannot be read"
            self._fault = f"{what}; make the questions again with psoups questions make, and start the server again"
        else:
            self._fault = None

    def state(self, user: str, num_questions: int | None = None) -> QuestionsState:
        """Return the next question and the estimate of a user.

        Args:
            user: the user's name.
            num_questions: ask this many questions, instead of stopping as the server's rule says.

        Raises:
            ApiError: 409 if the experts differ from the pool's, or if the user's answers belong to another pool.
        """
        return self._state_of(self._session(user, num_questions))

    def answer(self, user: str, question: str, choice: ShownChoice, num_questions: int | None = None) -> QuestionsState:
        """Store the answer to the current question, and return the state after it.

        An answer that is stored already is not stored again, so a client can repeat the request.

        Raises:
            ApiError: 409 if the question has another answer, or is not the current one.
        """
        for _ in range(_ATTEMPTS):
            session = self._session(user, num_questions)
            earlier = next((each for each in session.answers if each.question.id == question), None)
            if earlier is not None:
                if _shown(earlier) != choice:
                    raise _conflict(
                        "already_answered",
                        f"the question {question!r} has another answer already; take that answer back to change it",
                    )
                return self._state_of(session)
            following = self._answered(session, question, choice)
            try:
                self._store.answers.add(user, following.answers[-1], expected=session.num_asked)
            except (AnswersChanged, AnsweredOtherwise):
                continue  # another request was faster: look at its answers
            return self._state_of(following)
        raise _conflict("answers_changed", "other requests change the answers of this user; get the questions again")

    def take_back(self, user: str, question: str | None = None, num_questions: int | None = None) -> QuestionsState:
        """Delete the last answer, and return the state before it.

        Args:
            user: the user's name.
            question: the question whose answer is deleted, so that a repeated request deletes no second answer. If it
                has no answer, nothing is deleted.
            num_questions: as for `state`.

        Raises:
            ApiError: 404 if there is no answer; 409 if `question` is not the question that was answered last.
        """
        for _ in range(_ATTEMPTS):
            session = self._session(user, num_questions)
            answered = [each.question.id for each in session.answers]
            if question is not None and question not in answered:
                return self._state_of(session)
            if not answered:
                raise ApiError(404, "there is no answer to take back", code="no_answers")
            if question is not None and question != answered[-1]:
                raise _conflict("not_last", f"{question!r} is not the question that was answered last")
            try:
                self._store.answers.undo(user, expected=session.num_asked)
            except AnswersChanged:
                continue
            return self._state_of(session.undone())
        raise _conflict("answers_changed", "other requests change the answers of this user; get the questions again")

    def forget(self, user: str) -> None:
        """Delete all answers of a user. This works with another pool's answers, too."""
        self._store.answers.delete(user)

    def profile(self, user: str) -> Profile:
        """Return the profile that a user's answers give.

        Raises:
            ApiError: 409 as for `state`; 422 if the answers show no preference.
        """
        session = self._session(user, None)
        try:
            return self._profile_of(session)
        except SoupError as error:
            raise ApiError(422, f"{error.what}; {error.mend}", code="no_preference") from error

    def _session(self, user: str, num_questions: int | None) -> InferenceSession:
        if self._fault is not None:
            raise _conflict("experts_changed", self._fault)
        stopping = self._stopping
        if num_questions is not None:
            stopping = replace(stopping, max_questions=num_questions, certainty=None)
        answers = tuple(self._store.answers.of(user))
        try:
            return InferenceSession(self._pool, user, answers, stopping)
        except SoupError as error:
            raise _conflict("other_questions", f"{error.what}; {error.mend}") from error

    def _answered(self, session: InferenceSession, question: str, choice: ShownChoice) -> InferenceSession:
        current = session.next
        if current is None or current.question.id != question:
            what = "there is no current question" if current is None else f"{question!r} is not the current question"
            raise _conflict("not_asked", f"{what}; get the questions again")
        return session.answered(question, _stored(choice, swapped=current.swapped))

    def _state_of(self, session: InferenceSession) -> QuestionsState:
        shown = session.next
        question = None
        if shown is not None:
            texts = (shown.question.a, shown.question.b)
            question = QuestionBody(
                id=shown.question.id,
                number=session.num_asked + 1,
                prompt=shown.question.prompt,
                answers=texts[::-1] if shown.swapped else texts,
            )
        return QuestionsState(
            user=session.user,
            num_answered=session.num_asked,
            num_questions=min(session.stopping.max_questions, len(self._pool.questions)),
            last_answered=session.answers[-1].question.id if session.answers else None,
            done=session.is_done,
            question=question,
            estimate=self._estimate_of(session),
        )

    def _estimate_of(self, session: InferenceSession) -> EstimateBody:
        preferences = preferences_of(session.estimate, self._pool.names, self._rule)
        try:
            profile = self._profile_of(session).model_dump(exclude_defaults=True)
        except SoupError:
            profile = None
        return EstimateBody(
            num_answers=session.estimate.num_answers,
            preferences=[
                PreferenceBody(
                    dimension=each.dimension,
                    preferred=each.preferred,
                    other=each.other,
                    strength=each.strength,
                    interval=each.interval,
                    level=each.level,
                    probability=each.probability,
                    certainty=each.certainty,
                )
                for each in preferences
            ],
            sentence=summary(preferences),
            notes=session.notes(),
            agreement=None if math.isnan(session.agreement) else session.agreement,
            profile=profile,
        )

    def _profile_of(self, session: InferenceSession) -> Profile:
        return profile_of(session.estimate, self._pool.names, self._pool.differences, self._rule, user=session.user)


def _side_rule(pool: QuestionPool, catalogue: Catalogue | None) -> SideRule:
    """Return the rule that knows the dimension of each expert: the recorded one, or that of the catalogue."""
    rule = SideRule.of(pool.record.experts)
    found: dict[str, str] = {}
    for expert in pool.record.experts:
        dimension = None if catalogue is None else catalogue.dimension_of(expert.side or expert.name)
        if dimension is not None:
            found[expert.name] = dimension
    return SideRule({**found, **rule.dimension_of}, rule.side_of)


def _stored(choice: ShownChoice, *, swapped: bool) -> Choice:
    """Return the choice that is stored for a choice between the shown answers."""
    match choice:
        case "first":
            return "b" if swapped else "a"
        case "second":
            return "a" if swapped else "b"
        case _:
            return choice


def _shown(answered: AnsweredQuestion) -> ShownChoice:
    """Return the choice between the shown answers for a stored choice."""
    is_swapped = answered.answer.swapped
    match answered.answer.choice:
        case "a":
            return "second" if is_swapped else "first"
        case "b":
            return "first" if is_swapped else "second"
        case choice:
            return choice


def _conflict(code: str, message: str) -> ApiError:
    return ApiError(409, message, code=code)
