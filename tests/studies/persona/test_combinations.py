"""Weights that are chosen on forecasts: the optimum of the logistic loss, and the best of a grid."""

from __future__ import annotations

import numpy as np
import pytest

from personalized_soups.scoring.margin_forecast import MarginForecast
from personalized_soups.studies.persona.combinations import (
    SCALES,
    Combination,
    agreement,
    best_scale,
    combinations,
    fitted_weights,
    mean_agreement,
)

TRAITS = ("calm", "keen")
EXPERTS = ("calm", "not-calm", "keen", "not-keen")


@pytest.fixture
def forecasts() -> dict[str, MarginForecast]:
    rng = np.random.default_rng(0)
    return {
        trait: MarginForecast(EXPERTS, rng.normal(size=30), rng.normal(loc=(1.0, -1.0, 0.5, -0.5), size=(30, 4)))
        for trait in TRAITS
    }


def test_combinations_are_all_signs_and_name_their_experts() -> None:
    listed = combinations(TRAITS)
    assert [one.name for one in listed] == ["calm+keen", "calm+not-keen", "not-calm+keen", "not-calm+not-keen"]
    assert [listed[1].sign_of(trait) for trait in TRAITS] == [1, -1]


def test_agreement_is_with_the_wanted_side() -> None:
    margins = {"calm": np.array([1.0, 2.0, -1.0, 1.0]), "keen": np.array([1.0, -1.0, -1.0, 0.0])}
    wanted = Combination(TRAITS, (True, False))
    assert agreement(margins, wanted) == {"calm": 0.75, "keen": 0.625}
    assert mean_agreement(margins, wanted) == 0.6875


def test_fitted_weights_are_the_optimum_of_the_penalised_logistic_loss(forecasts: dict[str, MarginForecast]) -> None:
    wanted, penalty = Combination(TRAITS, (True, False)), 2.0
    weights = fitted_weights(forecasts, wanted, EXPERTS, penalty=penalty)
    w = np.array([weights[name] for name in EXPERTS])
    gradient = -penalty * (w - np.array([0.5, 0.0, 0.0, 0.5]))
    for trait, sign in zip(TRAITS, (1, -1), strict=True):
        margins = sign * (forecasts[trait].base + forecasts[trait].changes @ w)
        gradient += (sign * forecasts[trait].changes).T @ (1 / (1 + np.exp(margins)))
    # Newton's method ends with a step that is exact to rounding, of a loss with 60 terms of order 1
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_fitted_weights_count_once_what_experts_have_in_common(forecasts: dict[str, MarginForecast]) -> None:
    """Two experts that make the same changes get the same sum of weights as one of them alone, apart from the prior."""
    copied = {
        trait: MarginForecast(("calm", "keen"), one.base, one.changes[:, [0, 0]]) for trait, one in forecasts.items()
    }
    single = {trait: MarginForecast(("calm",), one.base, one.changes[:, :1]) for trait, one in forecasts.items()}
    wanted = Combination(TRAITS, (True, True))
    both = fitted_weights(copied, wanted, ("calm", "keen"), penalty=1e-9)
    alone = fitted_weights(single, wanted, ("calm",), penalty=1e-9)
    assert both["calm"] + both["keen"] == pytest.approx(alone["calm"], abs=1e-6)
    assert both["calm"] == pytest.approx(both["keen"], abs=1e-6)


def test_the_best_scale_has_the_best_forecast_of_all(forecasts: dict[str, MarginForecast]) -> None:
    listed = combinations(TRAITS)

    def value(scale: float) -> float:
        total = 0.0
        for one in listed:
            for trait in TRAITS:
                changes = sum(forecasts[trait].changes[:, EXPERTS.index(name)] for name in one.experts)
                total += float(np.mean(one.sign_of(trait) * (forecasts[trait].base + scale * changes) > 0))
        return total

    chosen = best_scale(forecasts, listed)
    assert chosen in SCALES
    assert value(chosen) == max(map(value, SCALES))
