from __future__ import annotations

import math
import random

import pytest

from personalized_soups.evaluation.win_rates import bootstrap_interval, win_rate


def test_ties_count_half() -> None:
    assert win_rate([1.0, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.9]).rate == (1 + 0.5 + 0.5 + 0) / 4


def test_swapping_the_two_turns_the_rate_around() -> None:
    rng = random.Random(0)
    ours, theirs = [rng.random() for _ in range(40)], [round(rng.random(), 1) for _ in range(40)]
    assert win_rate(ours, theirs).rate == pytest.approx(1 - win_rate(theirs, ours).rate)


def test_the_interval_is_that_of_a_binomial_where_there_are_no_ties() -> None:
    wins, total = 70, 100
    found = win_rate([1.0] * wins + [0.0] * (total - wins), [0.5] * total, num_resamples=20000)
    half = 1.96 * math.sqrt(0.7 * 0.3 / total)
    # the percentiles of a mean of 100 are multiples of 0.01, and 20000 resamples leave 0.004 of noise
    assert found.low == pytest.approx(0.7 - half, abs=0.012)
    assert found.high == pytest.approx(0.7 + half, abs=0.012)


def test_the_interval_is_drawn_from_a_seed() -> None:
    values = [random.Random(1).random() for _ in range(50)]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [0.0])])
def test_what_cannot_be_compared_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"for each prompt|finite"):
        win_rate(ours, theirs)
