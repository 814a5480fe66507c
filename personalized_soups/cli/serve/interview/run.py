"""One run of `psoups profile infer`: open the questions, ask them, and turn the answers into a profile."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from personalized_soups.cli import render
from personalized_soups.cli.serve.interview.loop import Answerer, AnswerLog, Ending, Interview
from personalized_soups.cli.serve.interview.pools import PoolSource
from personalized_soups.cli.serve.interview.result import InterviewResult
from personalized_soups.errors import SoupError, UsageError

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.evidence import AnsweredQuestion
    from personalized_soups.declare.profile import Profile
    from personalized_soups.declare.side_rule import SideRule
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.users.answers.selection import Rule
    from personalized_soups.users.answers.session import InferenceSession
    from personalized_soups.users.answers.stopping import StoppingRule
    from personalized_soups.users.answers.win_rate import WinRate

# The number of prompts of the predicted win rate. The answers of the soup and of the base to them are one batch.
_WIN_RATE_PROMPTS = 16
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class InferenceOptions:
    """How a user is asked, and how the answers become a profile.

    Attributes:
        stopping: when to stop asking.
        rule: how the next question is chosen.
        noise: the probability that the user presses the wrong button.
        scale: the greatest weight of the profile, or None for the default.
        allow_opposed: give both sides of a dimension their own weight.
        with_win_rate: predict the win rate.
    """

    stopping: StoppingRule
    rule: Rule
    noise: float
    scale: float | None
    allow_opposed: bool
    with_win_rate: bool


class InferenceRun:
    """Asks one user, and describes the answers.

    Args:
        user: the user's name.
        library: the experts.
        source: where the questions come from.
        options: how to ask.
    """

    def __init__(self, user: str, library: ExpertLibrary, source: PoolSource, options: InferenceOptions) -> None:
        self._user = user
        self._library = library
        self._source = source
        self._options = options

    @cached_property
    def model(self) -> SoupModel:
        """The base with the experts, loaded when it is first used. Asking needs no model."""
        from personalized_soups.mixing.model import SoupModel

        loading = self._source.loading
        return SoupModel.from_pretrained(
            loading.path,
            self._library,
            on=loading.on,
            device=loading.device,
            dtype=loading.dtype,
            same_base=loading.same_base,
        )

    @cached_property
    def rule(self) -> SideRule:
        """Knows the dimension of each expert."""
        from personalized_soups.declare.side_rule import SideRule

        return SideRule.of(self._library.values())

    def session(self, answers: Sequence[AnsweredQuestion], *, refit: str, restart: str) -> InferenceSession:
        """Return the user's session after the stored answers.

        Args:
            answers: the stored answers.
            refit: the command that estimates the weights of answers to another pool's questions.
            restart: the command that deletes the stored answers.

        Raises:
            UsageError: if the answers belong to the questions of another pool.
            SoupError: if the pool cannot be used.
        """
        from personalized_soups.users.answers.session import InferenceSession

        try:
            pool = self._source.open(self._library, lambda: self.model)
        except UsageError as error:
            if answers:  # they need no pool, because the texts of their questions are stored with them
                error.mend = f"{error.mend}; or estimate the weights from the stored answers: {refit}"
            raise
        known = {question.id: question for question in pool.questions}
        foreign = [each for each in answers if known.get(each.question.id) != each.question]
        if foreign:
            raise UsageError(
                f"{len(foreign)} of {len(answers)} stored answers are to questions that are not in {pool.folder}",
                where=f"the answers of {self._user!r}",
                mend=f"estimate the weights from the stored answers, without new questions: {refit}; or delete the "
                f"stored answers and start again: {restart}",
            )
        options = self._options
        return InferenceSession(pool, self._user, tuple(answers), options.stopping, options.rule, options.noise)

    def refitted(self, answers: Sequence[AnsweredQuestion]) -> InferenceSession:
        """Return a session with the rewards of the current experts, which has only the answered questions.

        Raises:
            UsageError: if there are no answers.
            SoupError: if the rewards cannot be computed.
        """
        from personalized_soups.scoring.implicit_rewards import ImplicitRewards
        from personalized_soups.users.answers.refitting import pool_of_answers
        from personalized_soups.users.answers.session import InferenceSession

        if not answers:
            raise UsageError(
                f"no answers of {self._user!r} are stored",
                where="refit",
                mend="leave out refit=True to answer questions, or check the name of the user",
            )
        rewards = ImplicitRewards(self.model, base=self._source.loading.path)
        pool = pool_of_answers(answers, rewards)
        options = self._options
        return InferenceSession(pool, self._user, tuple(answers), options.stopping, options.rule, options.noise)

    def asked(self, session: InferenceSession, answerer: Answerer, log: AnswerLog) -> tuple[InferenceSession, Ending]:
        """Ask the session's questions. See `Interview.run`."""
        interview = Interview(answerer, log, self.rule, render.say, lambda: shutil.get_terminal_size().columns)
        return interview.run(session)

    def profile(self, session: InferenceSession) -> Profile | None:
        """Return the profile that the answers give, or None if they show no preference."""
        from personalized_soups.users.answers.profile import SCALE, profile_of

        try:
            profile = profile_of(
                session.estimate,
                session.pool.names,
                session.pool.differences,
                self.rule,
                user=self._user,
                scale=SCALE if self._options.scale is None else self._options.scale,
                allow_opposed=self._options.allow_opposed,
            )
        except UsageError:
            return None
        # only the fields that say something are printed
        return profile if profile.allow_opposed else type(profile)(user=profile.user, weights=profile.weights)

    def result(self, session: InferenceSession, profile: Profile | None, version: int | None) -> InterviewResult:
        """Return what is known of the user. Predicting the win rate loads the model."""
        from personalized_soups.users.answers.preferences import preferences_of
        from personalized_soups.users.answers.wording import summary

        preferences = preferences_of(session.estimate, session.pool.names, self.rule)
        prompts = _win_rate_prompts(session)
        return InterviewResult(
            user=self._user,
            preferences=preferences,
            summary=summary(preferences),
            notes=session.notes(),
            num_asked=session.num_asked,
            num_answers=session.estimate.num_answers,
            agreement=session.agreement,
            profile=profile,
            version=version,
            win_rate=self._win_rate(session, profile, prompts),
            num_prompts=len(prompts),
        )

    def _win_rate(self, session: InferenceSession, profile: Profile | None, prompts: Sequence[str]) -> WinRate | None:
        if profile is None or not self._options.with_win_rate:
            return None
        from personalized_soups.scoring.implicit_rewards import ImplicitRewards
        from personalized_soups.users.answers.soup_win_rate import soup_win_rate

        record = session.pool.record
        rewards = ImplicitRewards(
            self.model,
            experts=session.pool.names,
            beta={expert.name: expert.beta for expert in record.experts} or None,
            length_normalized=bool(record.options.get("length_normalized", False)),
            base=self._source.loading.path,
        )
        most = int(record.options.get("max_new_tokens", _MAX_NEW_TOKENS))
        try:
            own = session.pool.rewards(rewards)
            return soup_win_rate(self.model, own, session.estimate, profile, prompts, max_new_tokens=most)
        except SoupError as error:  # the profile is stored already, and the rest of the result does not need it
            render.say(f"the win rate is not predicted: {error.what}; {error.mend}")
            return None


def _win_rate_prompts(session: InferenceSession) -> list[str]:
    """Return some prompts of the pool. Prompts that the user has seen are used only if there are too few others."""
    seen = {answered.question.prompt for answered in session.answers}
    prompts = sorted(dict.fromkeys(session.pool.prompts), key=lambda prompt: prompt in seen)
    return prompts[:_WIN_RATE_PROMPTS]
