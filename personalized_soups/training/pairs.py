"""Make preference pairs from a base's own answers: sample answers, score them, and pair answers that differ.

The pool, which is all sampled answers, is sampled once and gives pairs for every side.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import InputError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.prompts import messages_of, with_text_before
from personalized_soups.scoring.scorers import Scorer, scorer_of
from personalized_soups.scoring.sentences import without_cut_sentence
from personalized_soups.training.data import Pair, write_lines
from personalized_soups.training.instructions import InstructedShare, repeats
from personalized_soups.training.length_matching import matched_selection, num_words


@dataclass(frozen=True, slots=True)
class Sampled:
    """One prompt and the answers that were sampled for it.

    Attributes:
        prompt: the plain prompt.
        answers: the answers, in the order of sampling.
        instructions: the instruction under which each answer was sampled, or None for a plain answer. It is empty if
            all answers are plain.
    """

    prompt: str
    answers: tuple[str, ...]
    instructions: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        """Check that each answer has its instruction, and make the instructions of plain answers empty."""
        if self.instructions and len(self.instructions) != len(self.answers):
            raise ValueError(f"{len(self.answers)} answers have {len(self.instructions)} instructions")
        if not any(self.instructions):
            object.__setattr__(self, "instructions", ())

    def without_echoes(self) -> tuple[str, ...]:
        """Return the answers that do not repeat the instruction under which they were sampled."""
        if not self.instructions:
            return self.answers
        return tuple(
            answer
            for answer, instruction in zip(self.answers, self.instructions, strict=True)
            if instruction is None or not repeats(answer, instruction)
        )

    def row(self) -> dict[str, Any]:
        """Return the line of a pool file. The line of a plain pool has no key `instructions`."""
        row: dict[str, Any] = {"prompt": self.prompt, "answers": list(self.answers)}
        return row | {"instructions": list(self.instructions)} if self.instructions else row

    @classmethod
    def of_row(cls, row: Any) -> Self:
        """Return the answers in a line of a pool file.

        Raises:
            ValueError, KeyError, TypeError: if the line has other content.
        """
        prompt, answers, instructions = row["prompt"], row["answers"], row.get("instructions", [])
        is_sound = isinstance(prompt, str) and isinstance(answers, list) and isinstance(instructions, list)
        if not is_sound or not all(isinstance(answer, str) for answer in answers):
            raise TypeError("the line is not a prompt with answers")
        if not all(isinstance(instruction, str | None) for instruction in instructions):
            raise TypeError("an instruction is not a text")
        return cls(prompt, tuple(answers), tuple(instructions))


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
    instructed: InstructedShare | None = None,
    first: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[Sampled]:
    """Sample `num_samples` answers to each prompt, and return them.

    Args:
        generator: samples the answers.
        prompts: the plain prompts.
        num_samples: the number of answers to each prompt, with the instructed ones.
        temperature, max_new_tokens, batch_size, seed: as for `Generator.answers`.
        instructed: how many of the answers are sampled under an instruction. By default, none.
        first: the index of the first prompt in a longer list of prompts that is sampled in portions.
        on_done: called after each batch with the number of finished answers.
    """
    share = instructed or InstructedShare(0, ())
    instructions = [share.of_prompt(first + place, num_samples=num_samples) for place in range(len(prompts))]
    asked = [
        with_text_before(prompt, instruction or "")
        for prompt, own in zip(prompts, instructions, strict=True)
        for instruction in own
    ]
    answers = generator.answers(
        asked,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        places=range(first * num_samples, first * num_samples + len(asked)),
        on_done=on_done,
    )
    texts = [text for (text,) in answers]
    return [
        Sampled(prompt, tuple(texts[place * num_samples : (place + 1) * num_samples]), instructions[place])
        for place, prompt in enumerate(prompts)
    ]


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
    if not 0 < min_gap <= 1:
        raise ValueError(f"min_gap must be in (0, 1], got {min_gap}")
    score, end = scorer_of(catalogue, side, scorers=scorers), catalogue.side(side)[1].end
    is_matched = match_length and not catalogue.is_about_length(side)
    pairing = _paired_by_length if is_matched else _paired
    candidates: list[_Candidate] = []
    spans: list[tuple[float, float]] = []  # worst and best score of each prompt's valid answers
    for sampled in pool:
        own = sampled.without_echoes()
        answers = map(without_cut_sentence, own) if whole_sentences else own
        scored = [(score(sampled.prompt, answer), answer) for answer in answers]
        valid = sorted((result.toward(end), answer) for result, answer in scored if result.valid)
        invalid = sorted(answer for result, answer in scored if not result.valid)
        candidates += pairing(sampled.prompt, valid, invalid, min_gap)
        spans += [(valid[0][0], valid[-1][0])] if valid else []
    if not candidates:
        raise _no_pairs(side, pool, spans, min_gap)
    random.Random(f"pairs/{side}/{seed}").shuffle(candidates)
    candidates.sort(key=lambda pair: not pair.both_valid)
    kept = _matched(candidates, max_pairs) if is_matched else candidates[:max_pairs]
    return [_as_pair(candidate, conversational=conversational) for candidate in kept]


def write_pool(path: Path, pool: Sequence[Sampled]) -> None:
    """Write a pool as JSON lines. A failed write leaves `path` as it was."""
    write_lines(path, [sampled.row() for sampled in pool])


def read_pool(path: Path) -> list[Sampled]:
    """Return the pool from a file that `write_pool` has written.

    Raises:
        InputError: if the file cannot be read, is empty, or has a line that is not a prompt with answers.
    """
    pool = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the sampled answers can't be read: {error}", where=str(path), mend="sample the answers again"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pool.append(Sampled.of_row(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(
                "the line is not a JSON object with a prompt and a list of answers",
                where=f"{path}:{number}",
                mend="sample the answers again",
            ) from None
    if not pool:
        raise InputError("the file of sampled answers is empty", where=str(path), mend="sample the answers again")
    return pool


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


def _no_pairs(side: str, pool: Sequence[Sampled], spans: Sequence[tuple[float, float]], min_gap: float) -> InputError:
    """Return the error for a side without pairs. It says why no two answers differ enough."""
    low, high = min((low for low, _ in spans), default=0.0), max((high for _, high in spans), default=0.0)
    widest = max((best - worst for worst, best in spans), default=0.0)
    what = f"no two answers differ by {min_gap:g} for the side {side!r} ({len(pool)} prompts)"
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
