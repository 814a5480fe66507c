"""Label sampled answers for a side: a scorer rates each answer, or a judge compares two at a time.

The paper's second step. Labels are kept apart from pairs, so that a tie stays a tie, and pairs can be chosen anew
without asking a judge again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from personalized_soups.declare.json_lines import LineKind, SeenTexts, declared_lines
from personalized_soups.declare.preference_data import LabelledAnswers, LabelledComparison
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement, PairJudge
from personalized_soups.scoring.scorers import Scorer
from personalized_soups.scoring.sentences import without_cut_sentence
from personalized_soups.training.rollouts import Sampled

_KIND = LineKind("prompt with labelled answers", '{"prompt": "...", "side": "...", "answers": [...], "scores": [...]}')


@dataclass(frozen=True, slots=True)
class ScorerLabels:
    """Labels answers by the score of each.

    Attributes:
        side: the side's name.
        scorer: rates an answer.
        end: the end of the scale that the side prefers.
        whole_sentences: remove a last sentence that is cut off from each answer before it is rated. Otherwise an expert
            learns to end its answers within a sentence.
    """

    side: str
    scorer: Scorer
    end: Literal["low", "high"]
    whole_sentences: bool = False

    def of(self, sampled: Sampled) -> LabelledAnswers:
        """Return one prompt's answers with their scores. Answers that repeat their instruction are left out."""
        answers = _answers(sampled, whole_sentences=self.whole_sentences)
        scored = [self.scorer(sampled.prompt, answer) for answer in answers]
        return LabelledAnswers(
            prompt=sampled.prompt,
            side=self.side,
            answers=answers,
            scores=tuple(each.toward(self.end) if each.valid else None for each in scored),
        )


@dataclass(frozen=True, slots=True)
class JudgeLabels:
    """Labels answers by comparing them.

    Attributes:
        side: the side's name.
        judge: compares two answers.
        criterion: what the better answer does better, such as the side's instruction.
        num_comparisons: the number of comparisons for each prompt. None compares each answer once, with another one.
        whole_sentences: as for `ScorerLabels`.
        seed: the seed that draws which answers are compared, and in which order.
    """

    side: str
    judge: PairJudge
    criterion: str
    num_comparisons: int | None = None
    whole_sentences: bool = False
    seed: int = 0

    def of(self, pool: Sequence[Sampled]) -> tuple[list[LabelledAnswers], list[tuple[ComparedAnswers, Judgement]]]:
        """Return the prompts' answers with the judge's verdicts, and each comparison with its judgement.

        The judge gets the comparisons of all prompts at once. Answers that repeat their instruction are left out.

        Raises:
            SoupError: if the judge fails.
        """
        answers = [_answers(sampled, whole_sentences=self.whole_sentences) for sampled in pool]
        places = [self._places(sampled.prompt, own) for sampled, own in zip(pool, answers, strict=True)]
        compared = [
            ComparedAnswers(sampled.prompt, own[first], own[second], self.criterion)
            for sampled, own, pairs in zip(pool, answers, places, strict=True)
            for first, second in pairs
        ]
        judgements = self.judge.compare(compared)
        verdicts = iter(judgements)
        lines = [
            LabelledAnswers(
                prompt=sampled.prompt,
                side=self.side,
                answers=own,
                comparisons=tuple(
                    LabelledComparison(first=first, second=second, verdict=next(verdicts).verdict)
                    for first, second in pairs
                ),
            )
            for sampled, own, pairs in zip(pool, answers, places, strict=True)
        ]
        return lines, list(zip(compared, judgements, strict=True))

    def _places(self, prompt: str, answers: Sequence[str]) -> list[tuple[int, int]]:
        """Return the places of the answers to compare. Answers are compared only if their texts differ."""
        rng = random.Random(f"comparisons/{self.seed}/{prompt}")
        order = rng.sample(range(len(answers)), len(answers))
        once = list(zip(order[::2], order[1::2], strict=False))
        rest = [pair for pair in combinations(order, 2) if pair not in set(once)]
        differing = [
            (first, second) for first, second in once + rng.sample(rest, len(rest)) if answers[first] != answers[second]
        ]
        return differing[: len(answers) // 2 if self.num_comparisons is None else self.num_comparisons]


def read_labels(path: Path) -> list[LabelledAnswers]:
    """Return the lines of a file of labels, which must all be for the same side and of the same kind.

    Raises:
        DeclarationError: if the file cannot be read, a line is invalid, or the lines differ in their side or kind.
        InputError: if the file has no lines.
    """
    lines: list[LabelledAnswers] = []
    for line in declared_lines(path, LabelledAnswers, _KIND):
        if lines and line.side != lines[0].side:
            raise DeclarationError(
                f"the line is for the side {line.side!r}, but the first line is for {lines[0].side!r}",
                where=line.place("side"),
                mend="give one file for each side",
            )
        if lines and bool(line.scores) != bool(lines[0].scores):
            raise DeclarationError(
                "the file mixes lines with scores and lines with comparisons",
                where=line.place("answers"),
                mend="label all prompts in the same way",
            )
        lines.append(line)
    if not lines:
        raise InputError("the file of labels is empty", where=str(path), mend="label the answers again")
    return lines


def each_prompt_once(pool: Iterable[Sampled], path: Path) -> Iterator[Sampled]:
    """Yield the lines of a pool, and check that no prompt occurs twice.

    Raises:
        InputError: if a prompt occurs twice.
    """
    seen = SeenTexts()
    for number, sampled in enumerate(pool, start=1):
        if earlier := seen.add(sampled.prompt, f"prompt {number}"):
            raise InputError(
                f"prompt {number} of the file repeats {earlier}: {sampled.prompt[:60]!r}",
                where=str(path),
                mend="remove one of the two, or put all answers to a prompt in one line",
            )
        yield sampled


def _answers(sampled: Sampled, *, whole_sentences: bool) -> tuple[str, ...]:
    own = sampled.without_echoes()
    return tuple(map(without_cut_sentence, own)) if whole_sentences else own
