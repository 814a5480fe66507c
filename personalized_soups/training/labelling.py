"""Label a whole file of sampled answers, line by line. An interrupted run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.preference_data import LabelledAnswers
from personalized_soups.errors import InputError
from personalized_soups.files.digest import digest_file
from personalized_soups.files.lines import growing_lines
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement, PairJudge
from personalized_soups.scoring.mean_scorer import MeanScorer
from personalized_soups.training.labels import JudgeLabels, ScorerLabels, each_prompt_once
from personalized_soups.training.rollouts import Sampled, pool_lines

# The prompts whose comparisons a judge gets at once. A kill loses at most one portion, but not an LLM judge's replies,
# which are in its cache.
_PORTION = 64

Compared: TypeAlias = list[tuple[ComparedAnswers, Judgement]]
_Label: TypeAlias = Callable[[list[Sampled]], tuple[list[LabelledAnswers], Compared]]


@dataclass(frozen=True, slots=True)
class LabelRequest:
    """A request to label a file of sampled answers for one side, or for a combination of sides.

    Attributes:
        rollouts: the file of sampled answers.
        side: the side, or with `weights` the name that the labels have.
        catalogue: declares the side, its scorer and its instruction.
        judge: compares answers; the criterion is the instruction of the sides. None takes the sides' scorers, which
            rate them.
        num_comparisons: the number of a judge's comparisons for each prompt. None compares each answer once.
        whole_sentences: remove a last sentence that is cut off from each answer first.
        seed: the seed that draws which answers a judge compares.
        weights: the weight of each side in the score, for example those of a combination. By default, `side` alone.
    """

    rollouts: Path
    side: str
    catalogue: Catalogue
    judge: PairJudge | None = None
    num_comparisons: int | None = None
    whole_sentences: bool = False
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)

    def num_prompts(self) -> int:
        """Return the number of prompts, after a check of every line.

        Raises:
            DeclarationError: if a line is invalid.
            InputError: if a prompt occurs twice, or there are none.
        """
        count = sum(1 for _ in each_prompt_once(pool_lines(self.rollouts), self.rollouts))
        if not count:
            raise InputError(
                "the file of sampled answers is empty", where=str(self.rollouts), mend="sample the answers again"
            )
        return count

    def write(self, out: Path, *, overwrite: bool = False, on_done: Callable[[int], None] | None = None) -> Compared:
        """Write the file of labels, or resume it, and return what the judge compared in this run.

        Args:
            out: the file to write.
            overwrite: whether to replace a file that is complete or was begun with other settings.
            on_done: called with the number of prompts that are labelled.

        Raises:
            DeclarationError: if the side has no scorer, or a line of the answers is invalid.
            OutputExistsError: if `out` is complete and `overwrite` is false.
            UsageError: if `out` was begun with other settings and `overwrite` is false.
            RunError: if an LLM judge's endpoint fails. The labels so far are kept.
        """
        label, compared = self._labeller(), []
        with growing_lines(out, self._settings(), overwrite=overwrite) as lines:
            done = lines.num_done
            pool = islice(pool_lines(self.rollouts), done, None)
            while portion := list(islice(pool, _PORTION)):
                labelled, judged = label(portion)
                lines.add([line.model_dump(mode="json", exclude_defaults=True) for line in labelled])
                done += len(labelled)
                compared += judged
                if on_done is not None:
                    on_done(done)
        return compared

    def _labeller(self) -> _Label:
        if self.judge is None:
            scored = ScorerLabels(self.side, MeanScorer(self.catalogue, self._wanted), "high", self.whole_sentences)
            return lambda portion: ([scored.of(sampled) for sampled in portion], [])
        return JudgeLabels(
            self.side, self.judge, self._criterion, self.num_comparisons, self.whole_sentences, self.seed
        ).of

    @property
    def _wanted(self) -> Mapping[str, float]:
        return self.weights or {self.side: 1.0}

    @property
    def _criterion(self) -> str:
        return self.catalogue.instructions(list(self._wanted))

    def _settings(self) -> dict[str, Any]:
        """Return all on which the labels depend."""
        settings: dict[str, Any] = {
            "rollouts": digest_file(self.rollouts),
            "side": self.side,
            "whole_sentences": self.whole_sentences,
        }
        if self.judge is not None:
            drawn = {"num_comparisons": self.num_comparisons, "seed": self.seed}
            return settings | {"judge": self.judge.settings, "criterion": self._criterion, **drawn}
        rated = [
            {
                "scorer": self.catalogue.scorer_of(side).model_dump(mode="json"),
                "end": self.catalogue.side(side)[1].end,
                **({} if weight == 1 else {"weight": weight}),
            }
            for side, weight in self._wanted.items()
        ]
        return settings | (rated[0] if len(rated) == 1 else {"scorers": rated})
