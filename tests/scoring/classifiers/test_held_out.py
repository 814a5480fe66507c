from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from personalized_soups.errors import InputError
from personalized_soups.scoring.classifiers.held_out import accuracy_of, auc_of, folds_of
from personalized_soups.scoring.classifiers.labelled_texts import LabelledText
from personalized_soups.scoring.classifiers.length_control import correlation, log_lengths, matched_importance
from personalized_soups.scoring.classifiers.rows import Floats
from personalized_soups.scoring.classifiers.training import train_classifier


def _length_of(items: Sequence[tuple[str, str]]) -> Floats:
    return log_lengths([answer for _, answer in items])[:, None]


COMMON = [f"word{number}" for number in range(60)]


def make_texts(
    num: int, *, seed: int, tone: float = 0.0, extra: int = 0, words: int = 20, shuffled: bool = False
) -> list[LabelledText]:
    """Return `num` prompts with two answers each. A high answer has the word `glad` with the probability `tone`, and a
    low answer has the word `whatever` with it. A high answer is `extra` words longer. `shuffled` draws the classes by
    chance, so that nothing can be learned.
    """
    rng = random.Random(seed)
    texts = []
    for prompt in range(num):
        for is_high in (True, False):
            length = words + rng.randrange(10) + (extra if is_high else 0)
            chosen = rng.choices(COMMON, k=length)
            if rng.random() < tone:
                chosen[rng.randrange(length)] = "glad" if is_high else "whatever"
            label = rng.random() < 0.5 if shuffled else is_high
            texts.append(LabelledText(f"p{prompt}", " ".join(chosen), label, f"p{prompt}", f"{prompt}/{is_high}"))
    return texts


def test_the_held_out_figures_are_those_that_the_texts_allow() -> None:
    _, report = train_classifier(make_texts(150, seed=0, tone=0.6), seed=1)
    # Where a text has a marker, its class is known; elsewhere half of the guesses are right. The AUC of three values of
    # the score, with the shares .6, .4 and 0 against 0, .4 and .6, is 1 - .4 * .4 / 2 = .92.
    assert report.accuracy.low < 0.8 < report.accuracy.high
    assert report.auc.low < 0.92 < report.auc.high
    assert report.accuracy.high - report.accuracy.low < 0.15
    assert (report.num_texts, report.num_groups) == (300, 150)


def test_labels_by_chance_cannot_be_predicted() -> None:
    # Training figures would be near 1 here, because there are more terms than texts.
    _, report = train_classifier(make_texts(60, seed=3, shuffled=True), seed=0)
    assert report.auc.low < 0.5 < report.auc.high
    assert 0.3 < report.accuracy.value < 0.7


def test_repeated_answers_to_one_prompt_are_not_held_out_apart() -> None:
    # Each prompt has a secret word in all its answers, and one class. Only texts of the same prompt give it away.
    rng = random.Random(0)
    apart, together = [], []
    for prompt in range(20):
        for _ in range(10):
            text = " ".join([f"secret{prompt}", *rng.choices(COMMON, k=4)])
            apart.append(LabelledText("", text, prompt % 2 == 0, text, "x"))
            together.append(LabelledText("", text, prompt % 2 == 0, f"g{prompt}", "x"))
    assert train_classifier(apart, seed=0)[1].auc.value > 0.85
    assert train_classifier(together, seed=0)[1].auc.value < 0.65


def test_length_is_not_learned_where_it_is_controlled() -> None:
    # Only the length tells the classes apart. The one feature is the length itself, so nothing else can be learned.
    texts = make_texts(150, seed=5, extra=5)
    _, free = train_classifier(texts, states_of=_length_of, keep_length=True, seed=0)
    assert free.class_with_length > 0.5
    assert free.auc.low > 0.8
    controlled, _ = train_classifier(texts, states_of=_length_of, keep_length=False, seed=0)
    values = controlled.values([("", " ".join(["word"] * length)) for length in (20, 35)])
    uncontrolled, _ = train_classifier(texts, states_of=_length_of, keep_length=True, seed=0)
    others = uncontrolled.values([("", " ".join(["word"] * length)) for length in (20, 35)])
    assert others[1] - others[0] > 0.8
    assert abs(values[1] - values[0]) < 0.2


def test_matched_importance_gives_both_classes_one_distribution_of_lengths() -> None:
    rng = np.random.default_rng(0)
    is_high = (rng.random(2000) < 0.5).astype(float)
    lengths = rng.normal(is_high, 1.0)
    importance = matched_importance(lengths, is_high)
    high, low = importance * is_high, importance * (1 - is_high)
    assert high.sum() == pytest.approx(low.sum())
    before = lengths[is_high > 0].mean() - lengths[is_high == 0].mean()
    after = (high @ lengths) / high.sum() - (low @ lengths) / low.sum()
    # Within a stratum the difference of the means is at most its width: 20 strata of a range of about 6.
    assert before > 0.9
    assert abs(after) < 0.3
    edges = np.quantile(lengths, np.arange(1, 20) / 20)
    for stratum in range(20):
        inside = np.searchsorted(edges, lengths, side="right") == stratum
        assert (high @ inside) == pytest.approx(low @ inside)


def test_lengths_that_do_not_overlap_are_rejected() -> None:
    with pytest.raises(InputError, match="texts of each class have a text of the other") as caught:
        train_classifier(make_texts(300, seed=0, tone=1.0, extra=100))
    assert "keep_length=True" in caught.value.mend


def test_auc_and_accuracy_count_every_pair() -> None:
    rng = np.random.default_rng(2)
    scores = rng.integers(-3, 4, size=40).astype(float)  # with ties
    is_high, weights = (rng.random(40) < 0.4).astype(float), rng.integers(0, 4, size=40).astype(float)
    won = total = 0.0
    for i in np.flatnonzero(is_high):
        for j in np.flatnonzero(1 - is_high):
            pair = weights[i] * weights[j]
            won += pair * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
            total += pair
    assert auc_of(scores, is_high, weights) == pytest.approx(won / total, abs=1e-12)
    assert accuracy_of(np.array([1.0, -1.0, 0.0, 2.0]), np.array([1.0, 1.0, 0.0, 0.0]), np.ones(4)) == 1.5 / 4


def test_folds_keep_groups_whole_and_share_the_classes() -> None:
    texts = [LabelledText("", f"{n}", n % 3 == 0, f"g{n // 2}", "x") for n in range(200)]
    folds = folds_of(texts, 5, seed=0)
    assert all(folds[n] == folds[n + 1] for n in range(0, 200, 2))
    sizes = np.bincount(folds)
    assert sizes.min() >= 38
    assert sizes.max() <= 42
    shares = [np.mean([text.is_high for text, fold in zip(texts, folds, strict=True) if fold == k]) for k in range(5)]
    assert max(shares) - min(shares) < 0.08
    assert not np.array_equal(folds, folds_of(texts, 5, seed=1))


def test_correlation_and_lengths() -> None:
    first, second = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])
    assert correlation(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert correlation(first, np.ones(3)) == 0.0
    np.testing.assert_allclose(log_lengths(["", "a b", "don't stop"]), np.log([1, 3, 3]))
