"""Use ties as answers of their own, by the model of Rao and Kupper (1967, "Ties in paired-comparison experiments").

A user who sees a margin m between two items prefers the first with probability `sigmoid(m - t)`, prefers the second
with probability `sigmoid(-m - t)`, and otherwise calls a tie. The threshold t is the margin below which users see no
difference. The probability of a tie is

    sigmoid(m + t) - sigmoid(m - t) = (1 - exp(-2 t)) sigmoid(m + t) sigmoid(t - m).

So a tie has the likelihood of two binary answers: "better, even with t more", and "worse, even with t less". This
module turns answers into such rows for `estimate_weights`.

Shapes: N = answers, R = rows, D = base rewards.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.estimate import sigmoid
from personalized_soups.users.answers.prior import Floats


class TieRows(NamedTuple):
    """The rows of answers for `estimate_weights`: one for a preference, two for a tie.

    Attributes:
        differences: [R, D].
        labels: [R], 1 or 0.
        offsets: [R], the threshold or its negative.
    """

    differences: Floats
    labels: Floats
    offsets: Floats


def tie_rows(differences_ND: npt.ArrayLike, labels_N: npt.ArrayLike, threshold: float) -> TieRows:
    """Return the rows whose likelihood is that of the answers, up to a factor that does not depend on the weights.

    Args:
        differences_ND: `phi(a) - phi(b)` of each answered question.
        labels_N: 1 for `a`, 0 for `b`, 0.5 for a tie.
        threshold: the margin below which a user sees no difference, at least 0. With 0, a tie counts as half an answer
            for each side, twice.

    Raises:
        ValueError: if a label is another number, or the threshold is negative.

    Example:
        >>> rows = tie_rows([[1.0], [2.0]], [1.0, 0.5], threshold=0.7)
        >>> rows.labels.tolist(), rows.offsets.tolist()
        ([1.0, 1.0, 0.0], [-0.7, 0.7, -0.7])
    """
    differences, labels = np.asarray(differences_ND, dtype=np.float64), np.asarray(labels_N, dtype=np.float64)
    if not np.isin(labels, (0.0, 0.5, 1.0)).all():
        raise ValueError("a label is not 0, 0.5 or 1")
    if threshold < 0:
        raise ValueError(f"threshold is {threshold}, but must be at least 0")
    is_tie = labels == 0.5
    repeats = np.where(is_tie, 2, 1)
    place = np.repeat(np.arange(len(labels)), repeats)
    # the first row of a tie is won with t more, and the second row is lost with t less
    is_second = np.concatenate([np.arange(count) for count in repeats]) == 1 if len(labels) else np.zeros(0, bool)
    won = np.where(is_tie[place], ~is_second, labels[place] == 1)
    sign = np.where(is_tie[place], np.where(is_second, -1.0, 1.0), np.where(won, -1.0, 1.0))
    return TieRows(differences[place], won.astype(np.float64), sign * threshold)


def expected_information(margins_N: npt.ArrayLike, threshold: float) -> Floats:
    """Return [N]: the Fisher information of an answer about its margin: the mean of `-d2 log p / dm2` over answers.

    With a threshold of 0, it is `sigmoid'(m)`, since there are no ties.
    """
    margins = np.asarray(margins_N, dtype=np.float64)
    above, below = sigmoid(margins - threshold), sigmoid(margins + threshold)
    # the first term counts for `a` and ties, whose probability is sigmoid(m + t); the second counts for `b` and ties
    return above * (1 - above) * below + below * (1 - below) * (1 - above)
