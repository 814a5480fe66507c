"""`Vocabulary`: the words and pairs of words that a classifier counts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Self

from personalized_soups.scoring.classifiers.rows import SparseRows

# The version of `terms_of`. A classifier counts terms as it did when it was trained, so any change needs a new version.
VOCABULARY_VERSION = 1

# Words, and the marks that carry a tone.
_TERM = re.compile(r"[^\W_]+(?:['\-][^\W_]+)*|[!?]")


def terms_of(text: str) -> list[str]:
    """Return the words of a text, its `!` and `?`, and each pair of neighbours. Each number becomes 0.

    Example:
        >>> terms_of("Wait 20 minutes!")
        ['wait', '0', 'minutes', '!', 'wait 0', '0 minutes', 'minutes !']
    """
    found = _TERM.findall(text.lower().replace("\u2019", "'"))
    singles = ["0" if term.isdigit() else term for term in found]
    return [*singles, *map(" ".join, pairwise(singles))]


@dataclass(frozen=True)
class Vocabulary:
    """The terms that are features of a text. Other terms are ignored.

    The feature of a term is `log(1 + count)`, divided by the Euclidean norm of the text's features. So the features of
    a long text are not larger than those of a short one.

    Attributes:
        terms: the terms, in the order of the features.

    Example:
        >>> Vocabulary(("dust", "it")).rows(["Dust it!"]).values.round(3).tolist()
        [0.707, 0.707]
    """

    terms: tuple[str, ...]

    @classmethod
    def of(cls, texts: Sequence[str], *, min_texts: int = 3, max_terms: int = 20_000) -> Self:
        """Return the terms that occur in at least `min_texts` texts: the most frequent ones, at most `max_terms`."""
        counts = Counter(chain.from_iterable(set(terms_of(text)) for text in texts))
        frequent = [term for term, count in counts.items() if count >= min_texts]
        kept = sorted(frequent, key=lambda term: (-counts[term], term))[:max_terms]
        return cls(tuple(sorted(kept)))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {term: index for index, term in enumerate(self.terms)}

    def rows(self, texts: Sequence[str]) -> SparseRows:
        """Return [N, F]: the features of each text."""
        return SparseRows.of([self._entries(text) for text in texts], len(self.terms))

    def _entries(self, text: str) -> tuple[list[int], list[float]]:
        counts = Counter(self._index[term] for term in terms_of(text) if term in self._index)
        columns = sorted(counts)
        values = [math.log1p(counts[column]) for column in columns]
        norm = math.sqrt(math.fsum(value * value for value in values))
        return columns, [value / norm for value in values]
