"""Measure, on the pairs that experts were trained on or on held-out pairs, what the experts of a soup do to each other.

The angles between experts' deltas do not tell it: experts with similar directions may still move answers to a third
expert's prompts the wrong way. The changes of margins do (see `MarginForecast`).

Shapes: N = pairs of a side, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import fsum
from pathlib import Path

import numpy as np

from personalized_soups.errors import UsageError, choose_from
from personalized_soups.merging.doctor.diagnosis import Finding
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.encoded_answers import EncodedAnswer
from personalized_soups.scoring.implicit_rewards import ImplicitRewards
from personalized_soups.scoring.margin_forecast import MarginForecast
from personalized_soups.training.data import read_preferences
from personalized_soups.training.encoding import check_pairs, encode_pairs

# A side is harmed if the soup moves fewer of its pairs in the right direction than this share of the pairs that its
# expert moves alone.
KEPT = 0.8

# The longest text for a base whose configuration gives no context.
_MAX_LENGTH = 1 << 20


@dataclass(frozen=True, slots=True)
class SideForecast:
    """What a soup is expected to do to the pairs of one side.

    Attributes:
        side: the name of the side's expert.
        num_pairs: the number of pairs.
        alone: the share of pairs that the side's expert alone, at weight 1, moves towards the chosen answer.
        soup: the share of pairs that the soup is expected to move towards the chosen answer.
        changes: for each expert of the soup, its weight times its mean change of the margins of these pairs, in nats.
    """

    side: str
    num_pairs: int
    alone: float
    soup: float
    changes: dict[str, float]

    @property
    def is_harmed(self) -> bool:
        """Whether the other experts of the soup undo what the side's expert does."""
        return self.soup < KEPT * self.alone


class Interference:
    """The changes of margins that each expert makes to the pairs of each side. Margins are relative to the base.

    A pair's margin is `log pi(chosen) - log pi(rejected)`. Relative to the base, it is DPO's implicit reward of the
    pair divided by beta (Rafailov et al. 2023, arXiv:2305.18290), so the share of positive margins is what trainers
    report as the accuracy of the rewards.

    Args:
        forecasts: for each side, the forecast of its pairs.
    """

    def __init__(self, forecasts: Mapping[str, MarginForecast]) -> None:
        self.forecasts = dict(forecasts)

    @classmethod
    def measure(
        cls,
        model: SoupModel,
        files: Mapping[str, Path],
        *,
        num_pairs: int = 64,
        batch_size: int = 64,
        on_done: Callable[[int, int], None] | None = None,
    ) -> Interference:
        """Compute the margins of pairs under the base and under each expert alone.

        Args:
            model: the base with the experts. It needs a tokenizer.
            files: for each side, a file of preference pairs in TRL's format. A side has the name of an expert.
            num_pairs: the number of pairs of each file. They are drawn with seed 0.
            batch_size: the maximum number of rows in a forward pass.
            on_done: called after each batch with the number of finished answers and of all answers of one side.

        Raises:
            InputError: if a file cannot be read, a pair does not fit the base, or all pairs have equal answers.
            UsageError: if a side has no expert, or a number is less than 1.
        """
        if num_pairs < 1:
            raise UsageError(
                f"num_pairs is {num_pairs}, but must be at least 1", where="num_pairs", mend="give num_pairs=64"
            )
        rewards = ImplicitRewards(model, beta=1.0, batch_size=batch_size)
        forecasts = {}
        for side, path in files.items():
            if side not in model.experts:
                raise UsageError(
                    f"no expert is called {side!r}", where="pairs", mend=choose_from(side, list(model.experts))
                )
            answers = _some_answers(model, path, num_pairs)
            num_answers = len(set(answers))
            report = None if on_done is None else partial(_report, on_done, num_answers)
            table = rewards.encoded_features(answers, on_done=report)
            forecasts[side] = MarginForecast(rewards.names, np.zeros(len(answers) // 2), table[::2] - table[1::2])
        return cls(forecasts)

    def soup(self, weights: Mapping[str, float]) -> list[SideForecast]:
        """Return what the soup with these weights is expected to do to each side of which it has the expert."""
        return [
            SideForecast(
                side=side,
                num_pairs=len(forecast.base),
                alone=forecast.accuracy({side: 1.0}),
                soup=forecast.accuracy(weights),
                changes={
                    name: weight * float(forecast.changes[:, forecast.names.index(name)].mean())
                    for name, weight in weights.items()
                },
            )
            for side, forecast in self.forecasts.items()
            if weights.get(side, 0.0) > 0
        ]

    def findings(self, weights: Mapping[str, float]) -> list[Finding]:
        """Return a warning for each side that the other experts of the soup are expected to harm."""
        return [_finding(forecast) for forecast in self.soup(weights) if forecast.is_harmed]


def _finding(forecast: SideForecast) -> Finding:
    harmful = sorted((change, name) for name, change in forecast.changes.items() if change < 0)
    others = ", ".join(f"{name} ({change:+.2f})" for change, name in harmful) or "no expert alone"
    own = forecast.changes[forecast.side]
    gained = fsum(forecast.changes.values())
    return Finding(
        "warning",
        "interference",
        f"the soup is expected to move {forecast.soup:.0%} of the pairs for {forecast.side} towards the chosen answer, "
        f"but {forecast.side} alone moves {forecast.alone:.0%}: the mean margin changes by {gained:+.2f} instead of "
        f"{own:+.2f}, because of {others}",
        ", ".join([forecast.side, *(name for _, name in harmful)]),
        "give the harmful experts smaller weights, or train them with ties on the other sides' prompts; then evaluate "
        "the soup",
    )


def _report(on_done: Callable[[int, int], None], total: int, done: int) -> None:
    on_done(done, total)


def _some_answers(model: SoupModel, path: Path, num_pairs: int) -> list[EncodedAnswer]:
    """Return the chosen and the rejected answer of some pairs, in turn.

    As in training, texts that are longer than the base's context are cut.
    """
    generator = model.generator
    context = getattr(model.model.config, "max_position_embeddings", None)
    most = context if isinstance(context, int) else _MAX_LENGTH
    encoded = encode_pairs(read_preferences(path), generator.tokenizer, max_length=most)
    check_pairs(encoded, generator.tokenizer, generator.num_embeddings)
    chosen = np.random.default_rng(0).permutation(len(encoded.pairs))[:num_pairs]
    pairs = [encoded.pairs[index] for index in sorted(map(int, chosen))]
    return [EncodedAnswer(tuple(text), len(text) - len(pair.prompt_ids)) for pair in pairs for text in pair.cut(most)]
