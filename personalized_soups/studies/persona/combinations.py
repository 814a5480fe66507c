"""Combinations of sides, the soups for them, and how their weights are chosen on validation statements."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from personalized_soups.declare.profile import MethodName
from personalized_soups.scoring.margin_forecast import Floats, MarginForecast, accuracy
from personalized_soups.users.answers.estimate import estimate_weights
from personalized_soups.users.answers.prior import GaussianPrior

# The uniform weights among which the validation statements choose.
SCALES = (0.2, 1 / 3, 0.5, 0.7, 0.85, 1.0, 1.2)

# The strength of the prior of fitted weights: a standard deviation of 1 around `1/3` for the wanted experts and 0 for
# the others.
_PENALTY = 1.0


def expert_name(trait: str, *, has_trait: bool) -> str:
    """Return the name of the expert for a trait, or for its opposite."""
    return trait if has_trait else f"not-{trait}"


@dataclass(frozen=True, slots=True)
class Combination:
    """A wanted side of each of some traits.

    Attributes:
        traits: the names of the traits.
        signs: for each trait, whether the wanted side is the trait or its opposite.
    """

    traits: tuple[str, ...]
    signs: tuple[bool, ...]

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts of the wanted sides."""
        return tuple(expert_name(trait, has_trait=sign) for trait, sign in zip(self.traits, self.signs, strict=True))

    @property
    def name(self) -> str:
        """The names of the experts, joined by `+`."""
        return "+".join(self.experts)

    def sign_of(self, trait: str) -> int:
        """Return 1 if the trait is wanted, -1 if its opposite is wanted."""
        return 1 if self.signs[self.traits.index(trait)] else -1


def combinations(traits: Sequence[str]) -> list[Combination]:
    """Return all combinations of sides, the one with all traits first."""
    return [Combination(tuple(traits), signs) for signs in itertools.product((True, False), repeat=len(traits))]


@dataclass(frozen=True, slots=True)
class Soup:
    """One way to mix experts for a combination.

    Attributes:
        method: the merge method.
        weights: the weight of each expert.
    """

    method: MethodName
    weights: dict[str, float]

    @classmethod
    def uniform(cls, method: MethodName, experts: Sequence[str], weight: float) -> Soup:
        """Return a soup in which each of the experts has the same weight."""
        return cls(method, dict.fromkeys(experts, weight))


Forecasts = Mapping[str, MarginForecast]
"""For each trait, the forecast of the margins of its statements: positive for a person who has the trait."""


def agreement(margins: Mapping[str, Floats], combination: Combination) -> dict[str, float]:
    """Return, for each trait, the share of statements that are answered as the wanted side answers them.

    Args:
        margins: for each trait, the margins of its statements: positive if answered as with the trait.
        combination: the wanted sides.
    """
    return {trait: accuracy(combination.sign_of(trait) * margins[trait]) for trait in combination.traits}


def mean_agreement(margins: Mapping[str, Floats], combination: Combination) -> float:
    """Return the mean of `agreement` over the traits."""
    return float(np.mean(list(agreement(margins, combination).values())))


def best_scale(forecasts: Forecasts, chosen: Sequence[Combination]) -> float:
    """Return the uniform weight with the best forecast of the mean agreement over combinations."""

    def forecast(scale: float) -> float:
        values = []
        for combination in chosen:
            weights = dict.fromkeys(combination.experts, scale)
            margins = {trait: forecasts[trait].margins(weights) for trait in combination.traits}
            values.append(mean_agreement(margins, combination))
        return float(np.mean(values))

    return max(SCALES, key=forecast)


def fitted_weights(
    forecasts: Forecasts, combination: Combination, experts: Sequence[str], *, penalty: float = _PENALTY
) -> dict[str, float]:
    """Return the weights under which the validation statements are most likely answered as wanted.

    The forecast margins are linear in the weights, so this is a logistic regression with the base's margins as offsets.
    Weights may be negative. An expert that helps on its own trait and harms another gets a smaller weight, and what the
    experts have in common is counted once.

    Args:
        forecasts: the forecasts of validation statements.
        combination: the wanted sides.
        experts: the experts that may have a weight.
        penalty: the precision of the normal prior, whose mean is 1/3 for the wanted experts and 0 for all others.
    """
    rows, offsets = [], []
    for trait in combination.traits:
        forecast = forecasts[trait]
        columns = [forecast.names.index(name) for name in experts]
        rows.append(combination.sign_of(trait) * forecast.changes[:, columns])
        offsets.append(combination.sign_of(trait) * forecast.base)
    mean = np.array([1 / len(combination.traits) if name in combination.experts else 0.0 for name in experts])
    prior = GaussianPrior(mean, np.eye(len(experts)) / penalty)
    differences = np.concatenate(rows)
    estimate = estimate_weights(differences, np.ones(len(differences)), prior, offsets_N=np.concatenate(offsets))
    return {name: float(weight) for name, weight in zip(experts, estimate.mean, strict=True)}
