"""Score one model's answers once for each side, and summarize the scores for any combination of sides."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import fsum

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.scoring.scorers import Scorer, scorer_of

_WORD = re.compile(r"\w+(?:['-]\w+)*")


@dataclass(frozen=True, slots=True)
class Graded:
    """One answer with its scores.

    Args:
        prompt: the prompt.
        answer: the model's answer.
        valid: whether every scorer calls the answer well formed and on topic.
        toward: the score in [0, 1] towards each side. All scores of an invalid answer are 0.
        judged: the same, by the held-out judges. It is empty without judges.
    """

    prompt: str
    answer: str
    valid: bool
    toward: Mapping[str, float]
    judged: Mapping[str, float] = field(default_factory=dict)


def grade(
    prompts: Sequence[str],
    answers: Sequence[str],
    catalogue: Catalogue,
    sides: Sequence[str],
    *,
    scorers: Mapping[str, Scorer] | None = None,
) -> list[Graded]:
    """Score each answer towards each of `sides`.

    Args:
        prompts: the prompt of each answer.
        answers: the answers of one model.
        catalogue: declares the sides and their scorers.
        sides: the sides to score towards.
        scorers: functions that replace the catalogue's scorers, by the name of their side or dimension.

    Raises:
        DeclarationError: if the catalogue lacks a side, or a side has no scorer.
        ValueError: if there are not as many answers as prompts.
    """
    used = {side: (scorer_of(catalogue, side, scorers=scorers), catalogue.side(side)[1].end) for side in sides}
    graded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        scored = {side: (scorer(prompt, answer), end) for side, (scorer, end) in used.items()}
        valid = all(score.valid for score, _ in scored.values())
        toward = {side: score.toward(end) if valid else 0.0 for side, (score, end) in scored.items()}
        graded.append(Graded(prompt, answer, valid, toward))
    return graded


def worth(entry: Graded, sides: Sequence[str]) -> float:
    """Return the worth of an answer to a user who prefers `sides`: the mean of its scores towards them."""
    return fsum(entry.toward[side] for side in sides) / len(sides)


def mean_worth(graded: Sequence[Graded], sides: Sequence[str]) -> float:
    """Return the mean worth of all answers. Invalid answers count as 0."""
    return fsum(worth(entry, sides) for entry in graded) / len(graded)


def mean_toward(graded: Sequence[Graded], side: str, *, of_valid: bool = False) -> float:
    """Return the mean score of all answers towards one side, or 0 if there are no answers.

    With `of_valid`, only valid answers are included.
    """
    counted = [entry for entry in graded if entry.valid or not of_valid]
    return fsum(entry.toward[side] for entry in counted) / len(counted) if counted else 0.0


def joint_share(graded: Sequence[Graded], sides: Sequence[str]) -> float:
    """Return the share of answers that are valid and score above 0.5 towards all `sides` at once."""
    return sum(entry.valid and all(entry.toward[side] > 0.5 for side in sides) for entry in graded) / len(graded)


def valid_share(graded: Sequence[Graded]) -> float:
    """Return the share of valid answers."""
    return sum(entry.valid for entry in graded) / len(graded)


def distinct_bigrams(answers: Sequence[str], *, sample: int, seed: int = 0, num_draws: int = 20) -> float:
    """Return the share of distinct bigrams among `sample` bigrams drawn from the answers.

    This measure (Distinct-2, arXiv:1510.03055) falls with the length of the text, so models are compared at the same
    number of bigrams. The result is the mean over `num_draws` draws without replacement.

    Raises:
        ValueError: if the answers have fewer than `sample` bigrams.
    """
    bigrams = [pair for answer in answers for pair in _bigrams(answer)]
    if len(bigrams) < sample:
        raise ValueError(f"cannot draw {sample} bigrams, because the answers have only {len(bigrams)}")
    rng = random.Random(seed)
    return fsum(len(set(rng.sample(bigrams, sample))) for _ in range(num_draws)) / num_draws / sample


def num_bigrams(answers: Sequence[str]) -> int:
    """Return the number of bigrams in all answers."""
    return sum(len(_bigrams(answer)) for answer in answers)


def _bigrams(answer: str) -> list[tuple[str, str]]:
    words = _WORD.findall(answer.lower())
    return list(pairwise(words))
