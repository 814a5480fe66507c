"""Keep a classifier from learning the length of texts.

Shapes: N = texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from personalized_soups.errors import InputError
from personalized_soups.scoring.classifiers.rows import Floats

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*")

# The number of texts that a stratum of similar length has on average, and the largest number of strata.
_STRATUM = 20
_MAX_STRATA = 20

_LEAST = 10.0
_LEAST_SHARE = 0.1


def log_lengths(texts: Sequence[str]) -> Floats:
    """Return [N], float64: the logarithm of 1 plus the number of words of each text."""
    return np.log1p(np.array([len(_WORD.findall(text)) for text in texts], dtype=np.float64))


def matched_importance(lengths_N: Floats, is_high_N: Floats) -> Floats:
    """Return [N], float64: importances with which both classes have the same distribution of lengths.

    The texts are divided into strata of similar length, at quantiles of all lengths. In each stratum, the importances
    of both classes have the same sum: the number of texts of the smaller class. A stratum with texts of one class only
    has the importance 0.

    Raises:
        InputError: if the importances of a class have a sum of less than 10, or of less than a tenth of the smaller
            class. Then the lengths of the classes hardly overlap.
    """
    num = min(_MAX_STRATA, max(1, len(lengths_N) // _STRATUM))
    edges = np.unique(np.quantile(lengths_N, np.arange(1, num) / num))
    stratum_N = np.searchsorted(edges, lengths_N, side="right")
    highs = np.bincount(stratum_N, weights=is_high_N, minlength=num)
    lows = np.bincount(stratum_N, weights=1 - is_high_N, minlength=num)
    shared = np.minimum(highs, lows)
    own = np.where(is_high_N > 0, highs[stratum_N], lows[stratum_N])
    importance: Floats = shared[stratum_N] / own
    least = max(_LEAST, _LEAST_SHARE * min(highs.sum(), lows.sum()))
    if shared.sum() < least:
        raise InputError(
            f"only {shared.sum():.0f} texts of each class have a text of the other class of similar length, but at "
            f"least {least:.0f} are needed",
            where="the lengths of the texts",
            mend="give texts of similar lengths, or let the classifier learn the length (keep_length=True)",
        )
    return importance


def correlation(first_N: Floats, second_N: Floats) -> float:
    """Return Pearson's correlation of two lists, or 0 if one of them is constant."""
    first, second = first_N - first_N.mean(), second_N - second_N.mean()
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale > 0 else 0.0
