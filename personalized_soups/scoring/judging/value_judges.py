"""Judges that compare a value of each answer: the score of a scorer, or the output of a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement
from personalized_soups.scoring.reward_models import RewardModels
from personalized_soups.scoring.scorers import Scorer


class ScorerJudge:
    """A judge that prefers the answer whose score is nearer to one end. An invalid answer scores 0 there.

    Args:
        scorer: the scorer.
        end: the end of its scale that wins.
        min_gap: a smaller or equal difference is a tie.
        about: what is recorded of the scorer, such as its declaration.

    Example:
        >>> judge = ScorerJudge(length_scorer(low=2, high=10), end="low")
        >>> judge.compare([ComparedAnswers("Why?", "Because it rains a lot.", "It rains.")])[0].verdict
        'second'
    """

    def __init__(
        self, scorer: Scorer, *, end: Literal["low", "high"] = "high", min_gap: float = 0.0, about: object = None
    ) -> None:
        self._scorer, self._end, self._min_gap, self._about = scorer, end, min_gap, about

    @property
    def settings(self) -> dict[str, object]:
        """What is recorded of the scorer, its end and the gap."""
        return {"kind": "scorer", "scorer": self._about, "end": self._end, "min_gap": self._min_gap}

    def compare(
        self, comparisons: Sequence[ComparedAnswers], *, on_done: Callable[[int], None] | None = None
    ) -> list[Judgement]:
        """Return the judgement of each comparison. The criterion plays no part."""
        judgements = []
        for done, each in enumerate(comparisons, start=1):
            values = [self._scorer(each.prompt, answer).toward(self._end) for answer in (each.first, each.second)]
            judgements.append(Judgement.of_gap(values[0] - values[1], self._min_gap))
            if on_done is not None:
                on_done(done)
        return judgements


class RewardModelJudge:
    """A judge that prefers the answer with the larger output of a reward model.

    Args:
        models: holds exactly one reward model.
        min_gap: a smaller or equal difference of the outputs is a tie.

    Raises:
        ValueError: if `models` holds several models.
    """

    def __init__(self, models: RewardModels, *, min_gap: float = 0.0) -> None:
        if len(models.names) != 1:
            raise ValueError(f"a judge has one reward model, but there are {len(models.names)}")
        self._models, self._min_gap = models, min_gap

    @classmethod
    def open(cls, model: Path | str, *, device: str = "auto", min_gap: float = 0.0) -> RewardModelJudge:
        """Return the judge of a reward model, given by its folder or hub id.

        Raises:
            InputError, FileFormatError: as `RewardModels` does.
        """
        return cls(RewardModels({str(model): model}, device=device), min_gap=min_gap)

    @property
    def settings(self) -> dict[str, object]:
        """The model's name and digest, and the gap."""
        name = self._models.names[0]
        return {"kind": "reward_model", "model": name, "digest": self._models.digest, "min_gap": self._min_gap}

    def compare(
        self, comparisons: Sequence[ComparedAnswers], *, on_done: Callable[[int], None] | None = None
    ) -> list[Judgement]:
        """Return the judgement of each comparison. The criterion plays no part.

        Raises:
            InputError: if an answer is too long for the model, or its chat template rejects one.
        """
        items = {TextItem(each.prompt, answer): 0.0 for each in comparisons for answer in (each.first, each.second)}
        rewards = dict(zip(items, self._models.features(list(items))[:, 0].tolist(), strict=True))
        if on_done is not None:
            on_done(len(comparisons))
        return [
            Judgement.of_gap(
                rewards[TextItem(each.prompt, each.first)] - rewards[TextItem(each.prompt, each.second)], self._min_gap
            )
            for each in comparisons
        ]
