"""A simulated user who answers questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli.serve.interview.commands import Command, command_of

if TYPE_CHECKING:
    from personalized_soups.tiny.simulated_users import SimulatedUser
    from personalized_soups.users.answers.session import InferenceSession, ShownQuestion


def load_simulated_user(persona: Path, catalogue: Path) -> SimulatedUser:
    """Return the simulated user of a persona file.

    Args:
        persona: the file of the persona.
        catalogue: the catalogue that declares the dimensions and their scorers.

    Raises:
        DeclarationError: if a file is invalid, or the persona weighs a dimension that the catalogue does not score.
        SoupError: if a scorer cannot be loaded.
    """
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.persona import Persona
    from personalized_soups.tiny.simulated_users import PersonaRewards, SimulatedUser

    user = SimulatedUser(load(persona, Persona), PersonaRewards(load(catalogue, Catalogue)))
    user.rewards.weights(user.persona)  # raises before the first question is shown
    return user


class SimulatedAnswerer:
    """Answers as a simulated user. See `Answerer`.

    Args:
        user: the simulated user.
        num_answers: the number of answers of earlier runs, for users whose preferences change.
    """

    def __init__(self, user: SimulatedUser, num_answers: int) -> None:
        self._user = user
        self._num_answers = num_answers

    def command(self, shown: ShownQuestion, *, can_go_back: bool) -> Command | None:
        """Return the simulated user's choice."""
        choice = self._user.choice(shown.question, num_answers=self._num_answers)
        self._num_answers += 1
        return command_of(choice, swapped=shown.swapped)


def predicted_share(user: SimulatedUser, session: InferenceSession) -> tuple[float, int]:
    """Return the share of a simulated user's preferences that the estimate predicts, and their number.

    It counts the questions of the pool that were not asked and in which the user prefers one answer. If there are none,
    the share is NaN.
    """
    import numpy as np

    from personalized_soups.scoring.base_rewards import TextItem

    asked = set(session.asked)
    questions = [question for index, question in enumerate(session.pool.questions) if index not in asked]
    pairs = [(TextItem(each.prompt, each.a), TextItem(each.prompt, each.b)) for each in questions]
    preferred = user.prefers(pairs, num_answers=session.num_asked) if pairs else np.zeros(0)
    decided = preferred != 0.5
    if not decided.any():
        return float("nan"), 0
    predicted = session.open_differences @ session.estimate.mean > 0
    return float(np.mean(predicted[decided] == (preferred[decided] > 0.5))), int(decided.sum())
