"""The result of an interview: what the answers show, the profile, and what would make it more certain."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from personalized_soups.cli import render
from personalized_soups.cli.serve.interview.screen import guess_text

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.users.answers.preferences import Preference
    from personalized_soups.users.answers.win_rate import WinRate


_WIDEST_TEXT = 100


@dataclass(frozen=True, slots=True)
class InterviewResult:
    """What is known of a user after an interview.

    Attributes:
        user: the user's name.
        preferences: the preference in each dimension.
        summary: sentences that name the preferences.
        notes: warnings about the answers.
        num_asked: the number of questions asked, with the skipped ones.
        num_answers: the number of answers, without the skipped questions.
        agreement: the expected share of choices that the estimate predicts, or NaN if no question is left.
        profile: the profile, or None if the answers show no preference.
        version: the version of the profile in the store, or None if it was not stored.
        win_rate: the predicted win rate of the profile's soup against the base, or None if it was left out.
        num_prompts: the number of prompts of the win rate.
        predicted: for a simulated user, the share of preferences in other questions that the estimate predicts, and the
            number of these questions. None for a person.
    """

    user: str
    preferences: Sequence[Preference]
    summary: str
    notes: Sequence[str]
    num_asked: int
    num_answers: int
    agreement: float
    profile: Profile | None
    version: int | None
    win_rate: WinRate | None
    num_prompts: int
    predicted: tuple[float, int] | None = None

    @property
    def still_open(self) -> list[str]:
        """The dimensions in which no side is preferred yet."""
        return [preference.dimension for preference in self.preferences if preference.certainty == "open"]


def show_result(result: InterviewResult, *, store: str, use: Sequence[str], more: str | None) -> None:
    """Print a result.

    Args:
        result: the result.
        store: the store that has the profile.
        use: commands that use the profile.
        more: the command that asks more questions, or None if there are no more.
    """
    _show_preferences(result)
    _show_sentences(result.summary, *(f"Note: {note}" for note in result.notes))
    if guess := guess_text(result.agreement):
        _show_sentences(f"{guess}.")
    if result.win_rate is not None:
        rate = result.win_rate
        _show_sentences(
            f"Predicted win rate of your soup against the base: {rate.mean:.0%} ({rate.low:.0%} to {rate.high:.0%}), "
            f"on {result.num_prompts} prompts."
        )
    if result.predicted is not None and result.predicted[1]:
        share, count = result.predicted
        _show_sentences(f"The simulated user prefers the predicted answer in {share:.0%} of {count} other questions.")
    if result.profile is not None:
        from personalized_soups.declare.loader import dump

        is_stored = result.version is not None
        title = (
            f"Version {result.version} of the profile in {store}" if is_stored else "The profile, which is not stored"
        )
        render.show_text(f"\n{title}:\n{dump(result.profile)}\nUse it:")
        for command in use:
            render.show_text(f"  {command}")
    if more is not None:
        still_open = f"Still open: {', '.join(result.still_open)}. " if result.still_open else ""
        render.show_text(f"\n{still_open}More questions make the estimate more certain:\n  {more}")


def _show_preferences(result: InterviewResult) -> None:
    skipped = result.num_asked - result.num_answers
    title = f"{result.num_answers} answer{'' if result.num_answers == 1 else 's'}"
    render.show_table(
        ["dimension", "preferred", "over", f"strength ({_level(result)} range)", "certainty"],
        [
            [
                each.dimension,
                each.preferred,
                each.other,
                f"{each.strength:.2g} ({each.interval[0]:.2g} to {each.interval[1]:.2g})",
                f"{each.certainty} ({_percent(each.probability)})",
            ]
            for each in result.preferences
        ],
        title=f"{title}, {skipped} skipped" if skipped else title,
    )


def _percent(probability: float) -> str:
    """Return how certain the preferred or disliked side is. No answers make it 100%."""
    surest = max(probability, 1 - probability)
    return ">99%" if surest >= 0.995 else f"{surest:.0%}"


def _show_sentences(*paragraphs: str) -> None:
    """Print paragraphs, in a terminal with line breaks between words."""
    width = min(shutil.get_terminal_size().columns, _WIDEST_TEXT) if sys.stdout.isatty() else sys.maxsize
    for paragraph in paragraphs:
        render.show_text(textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False))


def json_of_result(result: InterviewResult) -> dict[str, Any]:
    """Return a result as a JSON object. A share that is not known is null."""
    return {
        "user": result.user,
        "done": True,
        "num_asked": result.num_asked,
        "num_answers": result.num_answers,
        "preferences": [
            {
                "dimension": each.dimension,
                "preferred": each.preferred,
                "other": each.other,
                "strength": each.strength,
                "interval": list(each.interval),
                "level": each.level,
                "probability": each.probability,
                "certainty": each.certainty,
            }
            for each in result.preferences
        ],
        "summary": result.summary,
        "notes": list(result.notes),
        "agreement": None if math.isnan(result.agreement) else result.agreement,
        "win_rate": None if result.win_rate is None else result.win_rate._asdict(),
        "profile": None if result.profile is None else result.profile.model_dump(mode="json", exclude_defaults=True),
        "version": result.version,
        **_json_of_predicted(result),
    }


def _json_of_predicted(result: InterviewResult) -> dict[str, Any]:
    """Return how well a simulated user is predicted. It is empty for a person."""
    if result.predicted is None:
        return {}
    share, count = result.predicted
    return {"predicted": {"share": None if math.isnan(share) else share, "num_questions": count}}


def _level(result: InterviewResult) -> str:
    return f"{result.preferences[0].level:.0%}" if result.preferences else "90%"
