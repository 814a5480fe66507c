from __future__ import annotations

from personalized_soups.evaluation.monotone import judge_sweep


def _points(*scores: float) -> list[list[float]]:
    return [[at / (len(scores) - 1), score] for at, score in enumerate(scores)]


def _band(*scores: float, half: float) -> list[list[float]]:
    return [[score - half, score + half] for score in scores]


def test_a_rising_or_level_sweep_is_monotone() -> None:
    verdict = judge_sweep(_points(0.1, 0.4, 0.4, 0.9))
    assert verdict.is_monotone
    assert verdict.is_within_noise
    assert str(verdict) == "monotone"


def test_a_dip_is_noise_where_the_intervals_overlap() -> None:
    scores = (0.1, 0.5, 0.45, 0.9)
    verdict = judge_sweep(_points(*scores), _band(*scores, half=0.03))
    assert not verdict.is_monotone
    assert verdict.is_within_noise
    assert verdict.largest_dip == 0.5 - 0.45
    assert verdict.dip_at == (1 / 3, 2 / 3)
    narrow = judge_sweep(_points(*scores), _band(*scores, half=0.02))
    assert narrow.is_within_noise is False
    assert str(narrow).startswith("not monotone: largest dip 0.050, from w = 0.333")


def test_a_slow_fall_in_small_steps_is_seen() -> None:
    scores = (0.5, 0.48, 0.46, 0.44)  # neighbours overlap, the ends do not
    verdict = judge_sweep(_points(*scores), _band(*scores, half=0.02))
    assert verdict.dip_at == (0.0, 1.0)
    assert verdict.is_within_noise is False


def test_without_intervals_a_dip_is_not_judged() -> None:
    verdict = judge_sweep(_points(0.1, 0.5, 0.4))
    assert verdict.is_within_noise is None
    assert "no intervals to judge it by" in str(verdict)
