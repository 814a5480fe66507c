"""p-values, Holm's adjustment and t intervals, against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalized_soups.evaluation.significance import holm, sign_flip_p_value, t_interval

shares = st.floats(min_value=0, max_value=1)


@given(st.dictionaries(st.text(min_size=1, max_size=2), shares, min_size=1, max_size=7))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: dict[str, float]) -> None:
    """At any alpha, the adjusted values reject the hypotheses that Holm's steps reject one after the other."""
    adjusted = holm(p_values)
    for alpha in (0.001, 0.05, 0.2, 0.7):
        rejected = set()
        for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
            if (len(p_values) - rank) * p_values[name] > alpha:
                break
            rejected.add(name)
        assert {name for name, value in adjusted.items() if value <= alpha} == rejected
    assert list(adjusted) == list(p_values)


def test_all_signs_are_counted() -> None:
    values = [0.3, -0.1, 0.8, 0.4, 0.2]
    sums = [float(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=5)]
    expected = sum(abs(each) >= abs(sum(values)) - 1e-12 for each in sums) / 32
    assert sign_flip_p_value(values) == expected
    assert sign_flip_p_value([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p_value([-value for value in values]) == expected


def test_random_signs_agree_with_all_signs() -> None:
    values = np.random.default_rng(0).normal(0.4, 1.0, size=12)
    exact = sign_flip_p_value(values.tolist())
    # a thirteenth cluster without a difference changes no sum, but makes the signs random
    drawn = sign_flip_p_value([*values.tolist(), 0.0], num_resamples=20_000)
    assert drawn == pytest.approx(exact, abs=4 * 0.5 / 20_000**0.5)


def test_false_findings_are_as_rare_as_the_p_value_says() -> None:
    rng = np.random.default_rng(1)
    p_values = np.array([sign_flip_p_value(rng.normal(size=9).tolist()) for _ in range(800)])
    for alpha in (0.05, 0.2):
        # four standard deviations of a share of 800
        assert np.mean(p_values <= alpha) <= alpha + 4 * (alpha * (1 - alpha) / 800) ** 0.5
    assert np.mean(p_values <= 0.2) > 0.1


def test_the_t_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(4000):
        found = t_interval(rng.normal(3.0, 2.0, size=3).tolist())
        assert found is not None
        hits += abs(found[0] - 3.0) <= found[1]
    assert hits / 4000 == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 4000) ** 0.5)
    assert t_interval([1.0]) is None
    assert t_interval([1.0] * 11) is None
    assert t_interval([1.0, 1.0]) == (1.0, 0.0)


def test_other_numbers_are_rejected() -> None:
    for values in ([], [float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="finite numbers"):
            sign_flip_p_value(values)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        holm({"a": 1.2})
