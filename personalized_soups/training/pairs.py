"""Preference pairs from a base's own answers: sample several to each prompt, score them, pair those that differ.

A pool of answers is sampled once and labelled for as many sides as there are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import InputError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.prompts import messages_of
from personalized_soups.scoring.scorers import Scorer, scorer_of
from personalized_soups.training.data import Pair, write_lines


@dataclass(frozen=True, slots=True)
class Sampled:
    """One prompt and the answers that a model gave to it."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    both_valid: bool


def sample_pool(
    generator: Generator,
    prompts: Sequence[str],
    *,
    num_samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[Sampled]:
    """Return `num_samples` sampled answers to each prompt; `on_done` hears how many answers there are so far."""
    answers = generator.answers(
        prompts,
        num_samples=num_samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        on_done=on_done,
    )
    return [Sampled(prompt, tuple(said)) for prompt, said in zip(prompts, answers, strict=True)]


def label_pool(
    pool: Sequence[Sampled],
    side: str,
    catalogue: Catalogue,
    *,
    min_gap: float = 0.3,
    max_pairs: int | None = None,
    seed: int = 0,
    conversational: bool = False,
    scorers: Mapping[str, Scorer] | None = None,
) -> list[Pair]:
    """Return pairs of answers that differ by at least `min_gap` in how well they suit `side`.

    The chosen answer is always valid. A prompt whose valid answers differ too little gives a pair with an invalid
    rejected answer instead, and those pairs are the first to be left out where there are more than `max_pairs`. Each
    answer stands in one pair at most: the best with the worst, the second best with the second worst, and so on.

    Args:
        pool: prompts with their answers.
        side: the side that the pairs favour.
        catalogue: declares the side and what scores it.
        min_gap: in (0, 1].
        max_pairs: a random choice of so many, or None for all.
        seed: of that choice and of the order.
        conversational: write prompt and answers as messages, for a base with a chat template.
        scorers: functions by the name of a side or dimension; each replaces the catalogue's scorer of that name.

    Raises:
        DeclarationError: if the catalogue has no such side, or nothing scores it.
        InputError: if no pair is found.
    """
    if not 0 < min_gap <= 1:
        raise ValueError(f"min_gap must be in (0, 1], got {min_gap}")
    score, end = scorer_of(catalogue, side, scorers=scorers), catalogue.side(side)[1].end
    candidates: list[_Candidate] = []
    spans: list[tuple[float, float]] = []  # of each prompt's valid answers, worst and best
    for sampled in pool:
        scored = [(score(sampled.prompt, answer), answer) for answer in sampled.answers]
        valid = sorted((found.toward(end), answer) for found, answer in scored if found.valid)
        invalid = sorted(answer for found, answer in scored if not found.valid)
        candidates += _paired(sampled.prompt, valid, invalid, min_gap)
        spans += [(valid[0][0], valid[-1][0])] if valid else []
    if not candidates:
        raise _no_pairs(side, pool, spans, min_gap)
    random.Random(f"pairs/{side}/{seed}").shuffle(candidates)
    candidates.sort(key=lambda pair: not pair.both_valid)
    kept = candidates[:max_pairs]
    return [_as_pair(candidate, conversational=conversational) for candidate in kept]


def write_pool(path: Path, pool: Sequence[Sampled]) -> None:
    """Write a pool as JSON lines, all or nothing."""
    write_lines(path, [{"prompt": sampled.prompt, "answers": list(sampled.answers)} for sampled in pool])


def read_pool(path: Path) -> list[Sampled]:
    """Return the pool of a file that `write_pool` wrote.

    Raises:
        InputError: naming file and line, if it is not such a file.
    """
    pool = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"the pool can't be read: {fault}", where=str(path), mend="sample it anew") from fault
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answers = row["prompt"], row["answers"]
            sound = isinstance(prompt, str) and isinstance(answers, list)
            sound = sound and all(isinstance(answer, str) for answer in answers)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise InputError(
                "expected a JSON object with a prompt and a list of answers",
                where=f"{path}:{number}",
                mend="sample the pool anew",
            )
        pool.append(Sampled(prompt, tuple(answers)))
    if not pool:
        raise InputError("the pool is empty", where=str(path), mend="sample it anew")
    return pool


def _paired(prompt: str, valid: list[tuple[float, str]], invalid: list[str], min_gap: float) -> list[_Candidate]:
    """Return the pairs of one prompt; `valid` is sorted by how well an answer suits the side."""
    pairs = [
        _Candidate(prompt, best, worst, high, low, both_valid=True)
        for (low, worst), (high, best) in zip(valid, reversed(valid[(len(valid) + 1) // 2 :]), strict=False)
        if high - low >= min_gap
    ]
    if pairs or not valid or not invalid:
        return pairs
    high, best = valid[-1]
    return [_Candidate(prompt, best, invalid[0], high, 0.0, both_valid=False)] if high >= min_gap else []


def _no_pairs(side: str, pool: Sequence[Sampled], spans: Sequence[tuple[float, float]], min_gap: float) -> InputError:
    """Return the error that says why there is no pair: no valid answer, all scored alike, or too near each other."""
    low, high = min((low for low, _ in spans), default=0.0), max((high for _, high in spans), default=0.0)
    widest = max((best - worst for worst, best in spans), default=0.0)
    what = f"no two answers differ by {min_gap:g} for the side {side!r} ({len(pool)} prompts)"
    if not spans:
        what += ": no answer is valid"
        mend = "look at the answers (pool=FILE keeps them): the scorer takes none of them for an answer"
    elif low == high:
        what += f": every valid answer scores {low:g}"
        mend = "mend the scorer: name markers, or bounds, that the base's own answers do meet (pool=FILE keeps them)"
    else:
        what += f": the scores lie from {low:g} to {high:g}, those of one prompt {widest:g} apart at most"
        mend = "sample more answers to each prompt, raise the temperature, lower the least gap, or mend the scorer"
    return InputError(what, where=f"pairs for {side}", mend=mend)


def _as_pair(candidate: _Candidate, *, conversational: bool) -> Pair:
    scores = {"chosen_score": candidate.chosen_score, "rejected_score": candidate.rejected_score}
    if not conversational:
        return {
            "prompt": candidate.prompt,
            "chosen": candidate.chosen,
            "rejected": candidate.rejected,
            **scores,
        }
    answers = {
        field: [{"role": "assistant", "content": text}]
        for field, text in (("chosen", candidate.chosen), ("rejected", candidate.rejected))
    }
    return {"prompt": messages_of(candidate.prompt), **answers, **scores}
