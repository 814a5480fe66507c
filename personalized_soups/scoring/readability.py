"""The Flesch-Kincaid grade of a text, also of one with lists and headings, or whose last sentence is cut off."""

from __future__ import annotations

import re

from personalized_soups.scoring.sentences import prose_of

_WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")
_VOWEL_GROUP = re.compile(r"[aeiouy]+")


def grade(text: str) -> float:
    """Return the Flesch-Kincaid grade: 0.39 * words per sentence + 11.8 * syllables per word - 15.59.

    Each group of vowels counts as a syllable, except a silent final e. Numbers of list items, headings and a last
    sentence that is cut off do not count, unless there is nothing else. A text without words has grade 0. Source:
    Kincaid et al. 1975.
    """
    sentences = [words for sentence in prose_of(text) if (words := _WORD.findall(sentence.lower()))]
    num_words = sum(map(len, sentences))
    if not num_words:
        return 0.0
    num_syllables = sum(_syllables(word) for words in sentences for word in words)
    return 0.39 * num_words / len(sentences) + 11.8 * num_syllables / num_words - 15.59


def _syllables(word: str) -> int:
    groups = len(_VOWEL_GROUP.findall(word))
    silent = word.endswith("e") and not word.endswith(("le", "ee", "ye")) and groups > 1
    return max(1, groups - silent)
