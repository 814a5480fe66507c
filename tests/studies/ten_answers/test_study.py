"""The gain of inferred weights as a share of the declared weights' gain, and settings that are rejected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.errors import UsageError
from personalized_soups.studies.elicitation.systems import ask
from personalized_soups.studies.study import Study
from personalized_soups.studies.ten_answers.study import (
    BASE,
    DECLARED,
    INFERRED,
    TenAnswersStudy,
    gain_interval,
    gain_share,
)
from personalized_soups.users.answers.prior import GaussianPrior

REWARDS = {BASE: [0.0, 1.0, -1.0], INFERRED: [1.0, 1.5, 0.0], DECLARED: [2.0, 2.0, 0.0]}


def test_the_gain_is_a_ratio_of_means_over_users() -> None:
    assert gain_share(REWARDS, range(3)) == pytest.approx((1.0 + 0.5 + 1.0) / (2.0 + 1.0 + 1.0))
    assert gain_share(REWARDS, [1, 1]) == pytest.approx(0.5)
    assert gain_share({**REWARDS, INFERRED: REWARDS[DECLARED]}, range(3)) == 1
    assert gain_share({**REWARDS, INFERRED: REWARDS[BASE]}, range(3)) == 0
    assert np.isnan(gain_share({**REWARDS, DECLARED: REWARDS[BASE]}, range(3)))
    assert gain_interval({**REWARDS, DECLARED: REWARDS[BASE]}) is None


def test_the_interval_is_that_of_all_resamples_of_users() -> None:
    """With three users, all 27 resamples can be listed; 2,000 random ones have nearly the same quantiles."""
    shares = [gain_share(REWARDS, [a, b, c]) for a in range(3) for b in range(3) for c in range(3)]
    interval = gain_interval(REWARDS)
    # the extreme resamples have one user three times, with a chance of 1/27 each: more than 2.5%
    assert interval is not None
    assert [*interval] == pytest.approx([min(shares), max(shares)])


def test_a_number_of_answers_without_an_estimate_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="num_answers is 9, but must be one of 2, 5, 10"):
        TenAnswersStudy(Study(), tmp_path, num_answers=9)


def test_more_questions_than_there_are_cannot_be_asked() -> None:
    prior, rng = GaussianPrior(np.zeros(1), np.eye(1)), np.random.default_rng(0)
    with pytest.raises(ValueError, match="2 questions are fewer than 5"):
        ask(lambda *_: 1.0, np.ones((2, 1)), prior, ["a", "b"], rule="prediction", rng=rng, num_questions=5)


def test_an_unfinished_quickstart_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished quickstart"):
        _ = TenAnswersStudy(Study(), tmp_path).scale


def test_a_quickstart_with_other_settings_is_rejected(tmp_path: Path) -> None:
    study = Study(seed=1)
    (tmp_path / "study.json").write_text(json.dumps(study.settings()))
    TenAnswersStudy(study, tmp_path).check()
    with pytest.raises(UsageError, match="no quickstart with these settings"):
        TenAnswersStudy(Study(seed=2), tmp_path).check()


def test_a_study_without_weights_of_linear_is_rejected(tmp_path: Path) -> None:
    recipe = Study().recipe
    selection = recipe.selection.replaced(weights={"factor_average": (1.0,)})
    with pytest.raises(UsageError, match="no weight of the method linear"):
        TenAnswersStudy(Study(recipe=recipe.replaced(selection=selection)), tmp_path).check()
