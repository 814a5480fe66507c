"""Choose preference pairs from labelled answers: of a prompt's answers, a better and a worse one for one side."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.preference_data import LabelledAnswers
from personalized_soups.errors import InputError
from personalized_soups.generation.prompts import messages_of
from personalized_soups.scoring.scorers import Scorer, scorer_of
from personalized_soups.training.data import Pair
from personalized_soups.training.labels import ScorerLabels
from personalized_soups.training.length_matching import matched_selection, num_words
from personalized_soups.training.rollouts import Sampled


@dataclass(frozen=True, slots=True)
class _Candidate:
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float | None = None  # without scores, a judge has compared the answers
    rejected_score: float | None = None
    both_valid: bool = True


def label_pool(
    pool: Sequence[Sampled],
    side: str,
    catalogue: Catalogue,
    *,
    min_gap: float = 0.3,
    max_pairs: int | None = None,
    seed: int = 0,
    conversational: bool = False,
    match_length: bool = False,
    whole_sentences: bool = False,
    scorers: Mapping[str, Scorer] | None = None,
) -> list[Pair]:
    """Return pairs of answers whose scores towards `side` differ by at least `min_gap`.

    The best answer to a prompt is paired with the worst, the second best with the second worst, and so on. The chosen
    answer is always valid. The rejected answer is invalid only if the valid answers to the prompt differ too little.
    If there are more than `max_pairs` pairs, pairs with an invalid answer are left out first, except where lengths are
    matched.

    The score alone decides, not the instruction under which an answer was sampled. The pair has the plain prompt. An
    answer that repeats its instruction is left out, so that the expert does not learn to speak of it.

    Args:
        pool: prompts with their answers.
        side: the side that the pairs favor.
        catalogue: declares the side and its scorer.
        min_gap: the minimum difference of the scores, in (0, 1].
        max_pairs: the maximum number of pairs. They are chosen at random. None returns all pairs.
        seed: random seed for the choice and the order of the pairs.
        conversational: whether to write prompt and answers as messages, for a base with a chat template.
        match_length: pair answers of similar length, and choose pairs whose differences in length have a mean near 0.
            A side that is about length (`Catalogue.is_about_length`) is not matched.
        whole_sentences: remove a last sentence that is cut off from each answer before it is scored. Otherwise the
            expert learns to end its answers within a sentence.
        scorers: functions that replace the catalogue's scorers, by the name of their side or dimension.

    Raises:
        DeclarationError: if the catalogue lacks the side, or the side has no scorer.
        InputError: if no prompt has two answers that differ enough.
        ValueError: if `min_gap` is not in (0, 1].
    """
    score, end = scorer_of(catalogue, side, scorers=scorers), catalogue.side(side)[1].end
    labels = ScorerLabels(side, score, end, whole_sentences)
    return choose_pairs(
        [labels.of(sampled) for sampled in pool],
        min_gap=min_gap,
        max_pairs=max_pairs,
        seed=seed,
        conversational=conversational,
        match_length=match_length and not catalogue.is_about_length(side),
        side=side,
    )


def choose_pairs(
    labels: Sequence[LabelledAnswers],
    *,
    min_gap: float = 0.3,
    max_pairs: int | None = None,
    seed: int = 0,
    conversational: bool = False,
    match_length: bool = False,
    side: str | None = None,
) -> list[Pair]:
    """Return pairs of a better and a worse answer from answers with labels.

    With scores, the best answer to a prompt is paired with the worst, and so on, as `label_pool` describes. With
    comparisons, each comparison with a winner is a pair.

    Args:
        labels: the lines of one side.
        min_gap: the minimum difference of two scores, in (0, 1]. It plays no part for comparisons.
        max_pairs, seed, conversational: as for `label_pool`.
        match_length: choose pairs whose differences in length have a mean near 0, and pair scored answers of similar
            length. Not for a side that is about length.
        side: the side's name. Without it, that of the first line.

    Raises:
        InputError: if there is no pair.
        ValueError: if `min_gap` is not in (0, 1].
    """
    if not 0 < min_gap <= 1:
        raise ValueError(f"min_gap must be in (0, 1], got {min_gap}")
    side = side or (labels[0].side if labels else "")
    candidates = [candidate for label in labels for candidate in _candidates(label, min_gap, match_length=match_length)]
    if not candidates:
        raise _no_pairs(side, labels, min_gap)
    random.Random(f"pairs/{side}/{seed}").shuffle(candidates)
    candidates.sort(key=lambda pair: not pair.both_valid)
    kept = _matched(candidates, max_pairs) if match_length else candidates[:max_pairs]
    return [_as_pair(candidate, conversational=conversational) for candidate in kept]


def tied_pairs(labels: Sequence[LabelledAnswers], *, conversational: bool = False) -> list[Pair]:
    """Return each tie of a judge twice, once with either answer as the chosen one.

    Trained along with other pairs, they hold an expert to the base where the side makes no difference.
    """
    return [
        _as_pair(_Candidate(label.prompt, *texts), conversational=conversational)
        for label in labels
        for compared in label.comparisons
        if compared.verdict == "tie"
        for texts in (
            (label.answers[compared.first], label.answers[compared.second]),
            (label.answers[compared.second], label.answers[compared.first]),
        )
    ]


def _candidates(label: LabelledAnswers, min_gap: float, *, match_length: bool) -> list[_Candidate]:
    if not label.scores:
        return [
            _Candidate(label.prompt, *_ordered(label.answers[compared.first], label.answers[compared.second], winner))
            for compared in label.comparisons
            if (winner := compared.verdict) in {"first", "second"}
        ]
    scored = list(zip(label.scores, label.answers, strict=True))
    valid = sorted((score, answer) for score, answer in scored if score is not None)
    invalid = sorted(answer for score, answer in scored if score is None)
    return (_paired_by_length if match_length else _paired)(label.prompt, valid, invalid, min_gap)


def _ordered(first: str, second: str, winner: str) -> tuple[str, str]:
    return (first, second) if winner == "first" else (second, first)


def _paired(prompt: str, valid: list[tuple[float, str]], invalid: list[str], min_gap: float) -> list[_Candidate]:
    """Return the pairs of one prompt. `valid` is sorted by score, with the worst answer first."""
    pairs = [
        _Candidate(prompt, best, worst, high, low, both_valid=True)
        for (low, worst), (high, best) in zip(valid, reversed(valid[(len(valid) + 1) // 2 :]), strict=False)
        if high - low >= min_gap
    ]
    if pairs or not valid or not invalid:
        return pairs
    high, best = valid[-1]
    return [_Candidate(prompt, best, invalid[0], high, 0.0, both_valid=False)] if high >= min_gap else []


def _paired_by_length(
    prompt: str, valid: list[tuple[float, str]], invalid: list[str], min_gap: float
) -> list[_Candidate]:
    """Return pairs of one prompt, each answer in one pair at most.

    The pairs with the largest value of score gap minus relative difference in length are taken first.
    """
    options = []
    for low_place, (low, worst) in enumerate(valid):
        for high_place, (high, best) in enumerate(valid[low_place + 1 :], start=low_place + 1):
            if high - low >= min_gap:
                words = num_words(best), num_words(worst)
                cost = abs(words[0] - words[1]) / max(1.0, sum(words) / 2) - (high - low)
                options.append((cost, low_place, high_place))
    pairs, used = [], set[int]()
    for _, low_place, high_place in sorted(options):
        if not used & {low_place, high_place}:
            used |= {low_place, high_place}
            (low, worst), (high, best) = valid[low_place], valid[high_place]
            pairs.append(_Candidate(prompt, best, worst, high, low, both_valid=True))
    return pairs or _paired(prompt, valid[-1:], invalid, min_gap)


def _matched(candidates: Sequence[_Candidate], max_pairs: int | None) -> list[_Candidate]:
    words = [(num_words(pair.chosen), num_words(pair.rejected)) for pair in candidates]
    differences = [chosen - rejected for chosen, rejected in words]
    lengths = [(chosen + rejected) / 2 for chosen, rejected in words]
    return [candidates[index] for index in matched_selection(differences, lengths, max_pairs=max_pairs)]


def _no_pairs(side: str, labels: Sequence[LabelledAnswers], min_gap: float) -> InputError:
    """Return the error for a side without pairs. It says why no two answers differ enough."""
    if any(label.comparisons for label in labels):
        counts = Counter(compared.verdict for label in labels for compared in label.comparisons)
        return InputError(
            f"no comparison has a winner: {counts['tie']} are ties, and {counts['unparsed']} have no verdict",
            where=f"pairs for {side}",
            mend="read some of the judge's replies, and sample answers that differ more: under instructions, or at a "
            "higher temperature",
        )
    spans = [
        (min(valid), max(valid))
        for label in labels
        if (valid := [score for score in label.scores if score is not None])
    ]
    low, high = min((low for low, _ in spans), default=0.0), max((high for _, high in spans), default=0.0)
    widest = max((best - worst for worst, best in spans), default=0.0)
    what = f"no two answers differ by {min_gap:g} for the side {side!r} ({len(labels)} prompts)"
    if not spans:
        what += ": no answer is valid"
        mend = "read the answers (pool=FILE stores them), and find out why the scorer calls all of them invalid"
    elif low == high:
        what += f": every valid answer scores {low:g}"
        mend = "change the scorer to markers or bounds that the base's answers reach (pool=FILE stores the answers)"
    else:
        what += f": all scores lie between {low:g} and {high:g}, and those of one prompt differ by at most {widest:g}"
        mend = "sample more answers to each prompt, raise the temperature, lower the minimum gap, or change the scorer"
    return InputError(what, where=f"pairs for {side}", mend=mend)


def _as_pair(candidate: _Candidate, *, conversational: bool) -> Pair:
    scores: dict[str, Any] = {}
    if candidate.chosen_score is not None:
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
