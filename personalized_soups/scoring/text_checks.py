"""Checks of an answer that need no model: repeated phrases, and the script of its letters."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*")

# The number of words in a sequence whose repetitions are counted.
_LENGTH = 4

# Writing systems that are mixed in one text count as one script.
_MIXED = {
    **dict.fromkeys(("HIRAGANA", "KATAKANA", "CJK", "HANGUL", "BOPOMOFO"), "EAST ASIAN"),
    **dict.fromkeys(("FULLWIDTH", "HALFWIDTH"), "EAST ASIAN"),
}


def distinct_share(text: str) -> float:
    """Return the share of distinct sequences of 4 words among all sequences of 4 words. It is 1 for a shorter text.

    A text that goes round in a loop repeats its sequences. Case and punctuation do not count.

    Example:
        >>> distinct_share("no, no, no, no, no, no")
        0.3333333333333333
    """
    words = _WORD.findall(text.lower())
    sequences = list(zip(*(words[start:] for start in range(_LENGTH)), strict=False))
    return len(set(sequences)) / len(sequences) if sequences else 1.0


def script_share(prompt: str, answer: str) -> float:
    """Return the share of the answer's letters that are of a script of the prompt: Latin, Cyrillic, Arabic, ...

    The result is 1 if the prompt or the answer has no letters. The Chinese, Japanese and Korean scripts count as one.

    Example:
        >>> script_share("How do I clean a lamp?", "Dust it \u043f\u044b\u043b\u044c.")
        0.6
    """
    expected, found = _scripts(prompt), _scripts(answer)
    if not expected or not found:
        return 1.0
    return sum(count for script, count in found.items() if script in expected) / found.total()


def _scripts(text: str) -> Counter[str]:
    return Counter(script for sign in text if sign.isalpha() and (script := _script(sign)))


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """Return the script of a letter by the first word of its Unicode name, or "" for a letter of no script."""
    name = unicodedata.name(letter, "").split()
    if not name or name[0] in {"MODIFIER", "FEMININE", "MASCULINE", "MICRO", "MATHEMATICAL", "DOUBLE-STRUCK"}:
        return ""
    return _MIXED.get(name[0], name[0])
