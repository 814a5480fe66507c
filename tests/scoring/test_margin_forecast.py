"""The forecast of a soup's margins: exact for the base and for each expert alone, and the derivative in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from personalized_soups import SoupModel
from personalized_soups.scoring.choices import choice_log_probs
from personalized_soups.scoring.margin_forecast import MarginForecast, accuracy
from tests.mixing.worlds import write_experts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PROMPTS = ["How do I wash the kettle?", "wash", "How do I rub it?", "Why do I wash the old kettle?"]


def margins(model: SoupModel, weights: dict[str, float] | None) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    table = choice_log_probs(model, PROMPTS, ["w", "r"], weights)
    difference: np.ndarray[tuple[int], np.dtype[np.float64]] = table[:, 0] - table[:, 1]
    return difference


@pytest.fixture
def model(tmp_path: Path, small_base: Path) -> SoupModel:
    folders = write_experts(tmp_path / "experts", base="base")
    return SoupModel.from_pretrained(small_base, folders[0].parent, device="cpu", dtype="float32")


def test_the_forecast_is_exact_for_the_base_and_for_single_experts(model: SoupModel) -> None:
    alone = {name: margins(model, {name: 1.0}) for name in model.experts}
    forecast = MarginForecast.of(margins(model, None), alone)
    np.testing.assert_array_equal(forecast.margins({}), margins(model, None))
    for name, values in alone.items():
        # base + (alone - base) rounds twice in float64
        np.testing.assert_allclose(forecast.margins({name: 1.0}), values, rtol=0, atol=1e-14)


def test_the_error_of_the_forecast_falls_with_the_square_of_the_weights(model: SoupModel) -> None:
    """Taylor: with changes measured at weight h and scaled to weight 1, the error at weights h is of second order."""
    errors = []
    for h in (0.2, 0.1):
        base = margins(model, None)
        alone = {name: base + (margins(model, {name: h}) - base) / h for name in model.experts}
        soup = dict.fromkeys(model.experts, h)
        errors.append(np.abs(MarginForecast.of(base, alone).margins(soup) - margins(model, soup)).max())
    # halving h divides a second-order error by 4, plus terms of third order
    assert 2.5 < errors[0] / errors[1] < 6


def test_accuracy_counts_half_for_a_margin_of_zero() -> None:
    assert accuracy([1.0, -1.0, 0.0, 0.0]) == 0.5
    assert accuracy([1.0, 2.0, 0.0, 3.0]) == 0.875


def test_an_unknown_expert_and_shapes_that_do_not_fit_are_rejected() -> None:
    forecast = MarginForecast(("warm",), np.zeros(2), np.ones((2, 1)))
    with pytest.raises(ValueError, match="unknown experts: cold"):
        forecast.margins({"cold": 1.0})
    with pytest.raises(ValueError, match="base has shape"):
        MarginForecast(("warm",), np.zeros(3), np.ones((2, 1)))
