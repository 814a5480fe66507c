"""Decide when enough questions were asked.

PReF (arXiv:2503.06358) has no stopping rule. This one asks how often the estimate would predict the answer that the
user's true weights prefer, on questions that were not asked. `Estimate.agreement` gives this probability for one
question: `Phi(|m| / sqrt(v))`, where m and v are the mean and variance of the margin `w . (phi(a) - phi(b))` under the
estimate. The expected agreement is its mean over the pool. It depends neither on the scale of the weights nor on the
units of the rewards. The report on simulated users compares the expected agreement with the true one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.estimate import Estimate


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """Stop when the estimate is certain enough, or when the budget is used up.

    Attributes:
        max_questions: the budget, at least 1. Skipped questions count.
        certainty: stop when the expected agreement is at least this, in (0.5, 1]. None asks all questions.
        min_questions: ask at least this many questions.

    Example:
        >>> StoppingRule(max_questions=10, certainty=0.9).max_questions
        10
    """

    max_questions: int = 10
    certainty: float | None = None
    min_questions: int = 3

    def __post_init__(self) -> None:
        if self.max_questions < 1:
            raise ValueError(f"max_questions is {self.max_questions}, but must be at least 1")
        if self.certainty is not None and not 0.5 < self.certainty <= 1:
            raise ValueError(f"certainty is {self.certainty}, but must be above 0.5 and at most 1")

    def is_done(self, estimate: Estimate, differences_QD: npt.ArrayLike, *, num_asked: int) -> bool:
        """Return whether to stop.

        Args:
            estimate: the estimate after the answers so far.
            differences_QD: `phi(a) - phi(b)` of the questions that were not asked, shape [Q, D].
            num_asked: the number of questions asked, including skipped ones.
        """
        if num_asked >= self.max_questions:
            return True
        if self.certainty is None or num_asked < self.min_questions:
            return False
        return expected_agreement(estimate, differences_QD) >= self.certainty


def expected_agreement(estimate: Estimate, differences_QD: npt.ArrayLike) -> float:
    """Return how often the estimate predicts the answer that the true weights prefer, on average over the questions.

    The result is in [0.5, 1], and NaN if there are no questions.
    """
    differences = np.asarray(differences_QD, dtype=np.float64)
    return float(np.mean(estimate.agreement(differences))) if len(differences) else float("nan")
