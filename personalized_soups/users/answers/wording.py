"""Say in words what the answers of a user show, and what is wrong with them. No sentence judges the user."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.declare.evidence import Answer
from personalized_soups.users.answers.preferences import Preference

# Answers of which no pattern is reported yet: a fair coin shows one side five times in a row once in 16 attempts.
_FEW = 6

# Answers contradict each other if each is predicted from the others no better than this. On the tiny base, users
# without error are above 0.63 in 9 of 10 cases.
_NO_BETTER_THAN_CHANCE = 0.6


def summary(preferences: Sequence[Preference]) -> str:
    """Return sentences that name the preferences, the clearest first.

    Example:
        >>> style = Preference("style", "friendly", "unfriendly", 1.5, (0.7, 2.3), 0.9, 0.99, "clear")
        >>> length = Preference("informativeness", "concise", "informative", 0.1, (-0.9, 1.1), 0.9, 0.57, "open")
        >>> summary([style, length])
        'You prefer friendly answers. It is still open whether you prefer concise or informative answers.'
    """
    clear = [_kind(each) for each in preferences if each.certainty == "clear"]
    likely = [_kind(each) for each in preferences if each.certainty == "likely"]
    still_open = [each for each in preferences if each.certainty == "open"]
    sentences = []
    if clear:
        sentences.append(f"You prefer {_listed(clear)} answers.")
    if likely:
        sentences.append(f"You probably prefer {_listed(likely)} answers.")
    for preference in still_open:
        if preference.other is None:
            sentences.append(f"It is still open whether you prefer {preference.preferred} answers.")
        else:
            pair = f"{preference.preferred} or {preference.other}"
            sentences.append(f"It is still open whether you prefer {pair} answers.")
    return " ".join(sentences)


def notes(answers: Sequence[Answer], left_out: float) -> list[str]:
    """Return warnings about the answers of a user: one position, only ties or skips, or contradictions.

    A user who answers at random is warned in about 4 of 10 cases after 10 answers, and more often later: ten active
    questions hardly repeat each other, so nearly any ten answers fit some taste.

    Args:
        answers: the answers, in the order in which they were given.
        left_out: how well each choice is predicted from the others; see `left_out_probability`.
    """
    positions = [(answer.choice == "a") != answer.swapped for answer in answers if answer.choice in {"a", "b"}]
    if len(answers) >= _FEW and not positions:
        return [f"You chose neither answer in all {len(answers)} questions, so nothing is known about you yet."]
    if len(positions) < _FEW:
        return []
    if len(set(positions)) == 1:
        place = "first" if positions[0] else "second"
        return [
            f"You chose the {place} answer all {len(positions)} times. The two answers are shown in random order, so "
            "these answers say little about you."
        ]
    if left_out < _NO_BETTER_THAN_CHANCE:
        return ["Your answers contradict each other, so the estimate is uncertain."]
    return []


def _kind(preference: Preference) -> str:
    """Return the kind of answers that a user prefers: `friendly`, or `not poetic` for an expert without an opponent."""
    return preference.preferred if preference.strength >= 0 else f"not {preference.preferred}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
