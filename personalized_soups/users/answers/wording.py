"""Say in words what the answers of a user show, and what is wrong with them. No sentence judges the user."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from personalized_soups.declare.evidence import Answer
from personalized_soups.users.answers.estimate import Estimate, sigmoid
from personalized_soups.users.answers.preferences import Preference

# Answers of which no pattern is reported yet: a fair coin shows one side five times in a row once in 16 attempts.
_FEW = 6

# A user who answers at random is told so if the estimate predicts the user's own answers no better than this.
_NO_BETTER_THAN_CHANCE = 0.6


def summary(preferences: Sequence[Preference]) -> str:
    """Return sentences that name the preferences, the clearest first.

    Example:
        >>> style = Preference("style", "friendly", "unfriendly", 1.5, (0.7, 2.3), 0.9, 0.99, "clear")
        >>> length = Preference("informativeness", "concise", "informative", 0.1, (-0.9, 1.1), 0.9, 0.57, "open")
        >>> summary([style, length])
        'You prefer friendly answers. It is still open whether you prefer concise or informative answers.'
    """
    clear = [each.preferred for each in preferences if each.certainty == "clear"]
    likely = [each.preferred for each in preferences if each.certainty == "likely"]
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


def notes(answers: Sequence[Answer], estimate: Estimate, differences_ND: npt.ArrayLike) -> list[str]:
    """Return warnings about the answers of a user: one position, only ties or skips, or contradictions.

    Args:
        answers: the answers, in the order in which they were given.
        estimate: the estimate after these answers.
        differences_ND: `phi(a) - phi(b)` of each answered question.
    """
    found = []
    positions = [(answer.choice == "a") != answer.swapped for answer in answers if answer.choice in {"a", "b"}]
    if len(positions) >= _FEW and len(set(positions)) == 1:
        place = "first" if positions[0] else "second"
        found.append(
            f"You chose the {place} answer all {len(positions)} times. The two answers are shown in random order, so "
            "these answers say little about you."
        )
    undecided = [answer for answer in answers if answer.choice in {"tie", "skip"}]
    if len(answers) >= _FEW and len(undecided) == len(answers):
        found.append(f"You chose neither answer in all {len(answers)} questions, so nothing is known about you yet.")
    elif not found and len(positions) >= _FEW and _fit(answers, estimate, differences_ND) < _NO_BETTER_THAN_CHANCE:
        found.append("Your answers contradict each other, so the estimate is uncertain.")
    return found


def _fit(answers: Sequence[Answer], estimate: Estimate, differences_ND: npt.ArrayLike) -> float:
    """Return the mean probability that the estimate gives to the user's own choices, without ties and skips."""
    probabilities = sigmoid(np.asarray(differences_ND, dtype=np.float64) @ estimate.mean)
    pairs = zip(answers, probabilities, strict=True)
    chosen = [p if answer.choice == "a" else 1 - p for answer, p in pairs if answer.choice in {"a", "b"}]
    return float(np.mean(chosen))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
