"""Second measures of expertise and of informativeness, for judging answers that other scorers have labelled.

A recipe names them as `kind: python`. They measure what the scorers `readability` and `length` do not: the vocabulary
without the sentences, and the content without the length.
"""

from __future__ import annotations

import re

from personalized_soups.scoring.scorers import Scored

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019\-][^\W\d_]+)*")
_LONG = 8  # letters

# The bounds were chosen on 260 answers of SmolLM2-135M-Instruct to other prompts than those of the studies: .18 of the
# words of a plain answer are long, and .08 of an answer for a child. A plain answer of 66 words has 32 content words.
_LONG_SHARES = (0.06, 0.22)
_CONTENT_WORDS = (6, 34)

# Words that carry grammar, not content.
_GRAMMAR = """
a about above after again all also am an and another any are as at be because been before being below between both
but by can could did do does doing down during each either else every few for from further get gets getting give had
has have having he her here hers him his how however i if in into is it its itself just let may me might more most
much must my myself no nor not now of off on once one only or other our ours out over own same she should so some
such than that the their theirs them then there these they this those through to too under until up upon us very was
we were what when where whether which while who whom whose why will with within without would yet you your yours
yourself
"""
_FUNCTION_WORDS = frozenset(_GRAMMAR.split())


def long_words(prompt: str, answer: str, /) -> Scored:
    """Return the score of an answer's vocabulary: its share of words with at least 8 letters, scaled to [0, 1].

    Other than a reading grade, it does not depend on the length of sentences.

    Example:
        >>> long_words("Why does it rain?", "Water vapour condenses in saturated atmospheric layers.").value
        1.0
    """
    words = _WORD.findall(answer)
    share = sum(len(word) >= _LONG for word in words) / max(1, len(words))
    return Scored(_scaled(share, *_LONG_SHARES), valid=bool(words))


def content_words(prompt: str, answer: str, /) -> Scored:
    """Return the score of an answer's content: the number of different words that carry content, scaled to [0, 1].

    Repetitions, words of the prompt and words of grammar do not count, so a padded answer scores low.

    Example:
        >>> content_words("Why does it rain?", "It rains because it rains, and because the rain has to fall.").value
        0.0
    """
    words = _WORD.findall(answer.lower())
    content = set(words) - _FUNCTION_WORDS - set(_WORD.findall(prompt.lower()))
    return Scored(_scaled(len(content), *_CONTENT_WORDS), valid=bool(words))


def _scaled(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
