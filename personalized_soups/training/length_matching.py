"""Choose pairs whose chosen and rejected answers are equally long on average, and report the difference.

Training on pairs whose chosen answers are longer teaches an expert to answer at length, whatever its side is (Singhal
et al. 2023, arXiv:2310.03716).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*")

# The mean difference that counts as none: this share of the mean length, or half a word.
_SHARE = 0.01
_WORDS = 0.5


@dataclass(frozen=True, slots=True)
class LengthDifference:
    """The mean difference in words between the chosen and the rejected answers, with its 95% interval.

    Attributes:
        mean: the mean of chosen minus rejected.
        low: the lower end of the interval.
        high: the upper end of the interval.
        chosen: the mean number of words of the chosen answers.
        rejected: the mean number of words of the rejected answers.
    """

    mean: float
    low: float
    high: float
    chosen: float
    rejected: float


def num_words(text: str) -> int:
    """Return the number of words of a text."""
    return len(_WORD.findall(text))


def length_difference(pairs: Sequence[Mapping[str, Any]]) -> LengthDifference:
    """Return how much longer the chosen answers are.

    The pairs of one prompt are not independent. So the interval is that of a mean of clusters: the standard error is
    the root of the sum of squares of the prompts' summed deviations, divided by the number of pairs, with the
    correction C / (C - 1) for C prompts.

    Args:
        pairs: pairs as `label_pool` returns them, at least one.
    """
    chosen, rejected = ([num_words(_text(pair[key])) for pair in pairs] for key in ("chosen", "rejected"))
    differences = [one - other for one, other in zip(chosen, rejected, strict=True)]
    mean = math.fsum(differences) / len(pairs)
    sums: dict[str, float] = {}
    for pair, difference in zip(pairs, differences, strict=True):
        prompt = str(pair["prompt"])
        sums[prompt] = sums.get(prompt, 0.0) + difference - mean
    spread = math.fsum(value * value for value in sums.values()) * len(sums) / max(1, len(sums) - 1)
    half = 1.96 * math.sqrt(spread) / len(pairs)
    return LengthDifference(
        mean, mean - half, mean + half, math.fsum(chosen) / len(pairs), math.fsum(rejected) / len(pairs)
    )


def matched_selection(differences: Sequence[int], lengths: Sequence[float], *, max_pairs: int | None) -> list[int]:
    """Return the indices of pairs whose differences in length have a mean near 0, in their order.

    The first `max_pairs` pairs are exchanged for later ones, and then pairs are left out, one at a time, as long as
    each change brings the mean nearer to 0. At most half of the pairs are left out. So the mean may still differ from
    0 if the chosen answers are longer almost everywhere.

    Args:
        differences: the words of the chosen minus those of the rejected answer, of each pair. The first pairs are
            preferred.
        lengths: the mean number of words of the two answers of each pair.
        max_pairs: the maximum number of pairs, or None for all.
    """
    difference_N: npt.NDArray[np.float64] = np.array(differences, dtype=np.float64)
    num = len(differences) if max_pairs is None else min(max_pairs, len(differences))
    kept, left = list(range(num)), list(range(num, len(differences)))
    least = (num + 1) // 2
    near = max(_WORDS, _SHARE * float(np.mean(lengths))) if len(lengths) else _WORDS
    while kept and abs(total := float(difference_N[kept].sum())) > near * len(kept):
        if left:
            sums = np.abs(total - difference_N[kept][:, None] + difference_N[left])
            place, other = divmod(int(sums.argmin()), len(left))
            if float(sums[place, other]) < abs(total):
                kept[place], left[other] = left[other], kept[place]
                continue
        # Leaving out the largest difference of the sign of the sum changes the mean most.
        means = np.abs(total - difference_N[kept]) / max(1, len(kept) - 1)
        if len(kept) <= least or float(means.min()) >= abs(total) / len(kept):
            break
        left.append(kept.pop(int(means.argmin())))
    return sorted(kept)


def _text(answer: Any) -> str:
    """Return the text of an answer, which is a string or a list of one message."""
    return answer if isinstance(answer, str) else str(answer[-1]["content"])
