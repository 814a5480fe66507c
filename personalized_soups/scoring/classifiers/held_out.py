"""Choose the penalty of a classifier by cross-validation, and measure the classifier on texts that are held out.

The groups of texts are divided into folds. The classifier that scores a fold is trained on the other folds, and its
penalty is chosen by cross-validation within them. So neither the terms nor the penalty depend on the texts that are
scored. How much each text counts, which gives both classes the same lengths, is computed from all texts.

Shapes: N = texts, F = features.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from personalized_soups.scoring.classifiers.labelled_texts import LabelledText
from personalized_soups.scoring.classifiers.length_control import correlation, log_lengths, matched_importance
from personalized_soups.scoring.classifiers.logistic import fit_logistic
from personalized_soups.scoring.classifiers.rows import Floats, Ints, Rows

# The penalties from which cross-validation chooses. The loss is a mean, so they do not depend on the number of texts.
PENALTIES = tuple(math.pow(10.0, exponent / 2) for exponent in range(-10, 1))
_FOLDS = 5
_INNER_FOLDS = 4
_NUM_DRAWS = 2000

# Returns the features of the texts with the second indices, made with what the texts with the first indices know.
Featurise: TypeAlias = Callable[[Ints, Ints], tuple[Rows, Rows]]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95% interval, from resampled groups."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class HeldOutReport:
    """How well a classifier separates texts that it was not trained on.

    Attributes:
        accuracy: the share of texts whose class is found. A text with log-odds of exactly 0 counts half.
        auc: the share of pairs of a high and a low text in which the high text scores higher. Ties count half.
        score_with_length: the correlation of the log-odds with the logarithm of the length.
        within_classes: the same correlation within each class, averaged. It has no share of the classes' own lengths.
        class_with_length: the correlation of the class with the logarithm of the length.
        num_texts: the number of texts.
        num_groups: the number of groups.
    """

    accuracy: Interval
    auc: Interval
    score_with_length: float
    within_classes: float
    class_with_length: float
    num_texts: int
    num_groups: int


def importance_of(texts: Sequence[LabelledText], *, keep_length: bool) -> Floats:
    """Return [N]: the importance of each text in training. Both classes have the same sum.

    Raises:
        InputError: if the length is not kept, and the lengths of the classes hardly overlap.
    """
    is_high = labels_of(texts)
    if not keep_length:
        return matched_importance(log_lengths([text.text for text in texts]), is_high)
    share: Floats = np.where(is_high > 0, 1 / is_high.sum(), 1 / (1 - is_high).sum())
    return share * len(texts) / 2


def labels_of(texts: Sequence[LabelledText]) -> Floats:
    """Return [N], float64: 1 for texts of the high class and 0 for the others."""
    return np.array([text.is_high for text in texts], dtype=np.float64)


def folds_of(texts: Sequence[LabelledText], num: int, seed: int) -> Ints:
    """Return [N]: the fold of each text. Texts of one group are in one fold, and folds have similar shares of classes.

    There are as many folds as groups if there are fewer groups than `num`.
    """
    classes: dict[str, set[bool]] = {}
    for text in texts:
        classes.setdefault(text.group, set()).add(text.is_high)
    kinds: dict[tuple[bool, ...], list[str]] = {}
    for group in sorted(classes):
        kinds.setdefault(tuple(sorted(classes[group])), []).append(group)
    rng = random.Random(f"folds/{seed}")
    dealt: list[str] = []
    for kind in sorted(kinds):
        rng.shuffle(kinds[kind])
        dealt += kinds[kind]
    fold = {group: place % num for place, group in enumerate(dealt)}
    return np.array([fold[text.group] for text in texts], dtype=np.int64)


def choose_penalty(
    featurise: Featurise, texts: Sequence[LabelledText], chosen: Ints, importance: Floats, *, seed: int
) -> float:
    """Return the penalty with the smallest mean loss on held-out folds of the texts `chosen`."""
    own = [texts[index] for index in chosen]
    fold_N, is_high = folds_of(own, _INNER_FOLDS, seed), labels_of(texts)
    losses = np.zeros(len(PENALTIES))
    for fold in np.unique(fold_N):
        train, held = chosen[fold_N != fold], chosen[fold_N == fold]
        if not _has_both(is_high[train], importance[train]):
            continue
        rows, held_rows = featurise(train, held)
        for place, penalty in enumerate(PENALTIES):
            log_odds = fit_logistic(rows, is_high[train], importance[train], penalty).log_odds(held_rows)
            losses[place] += float(importance[held] @ (np.logaddexp(0.0, log_odds) - is_high[held] * log_odds))
    return PENALTIES[int(losses.argmin())]


def held_out_report(
    featurise: Featurise, texts: Sequence[LabelledText], importance: Floats, *, seed: int
) -> HeldOutReport:
    """Return how well classifiers separate texts that they were not trained on."""
    fold_N, is_high = folds_of(texts, _FOLDS, seed), labels_of(texts)
    log_odds = np.zeros(len(texts))
    everything = np.arange(len(texts), dtype=np.int64)
    for fold in np.unique(fold_N):
        train, held = everything[fold_N != fold], everything[fold_N == fold]
        if not _has_both(is_high[train], importance[train]):
            continue  # their log-odds stay 0: nothing is known of them
        penalty = choose_penalty(featurise, texts, train, importance, seed=seed)
        rows, held_rows = featurise(train, held)
        log_odds[held] = fit_logistic(rows, is_high[train], importance[train], penalty).log_odds(held_rows)
    return _report(texts, is_high, log_odds, seed)


def _report(texts: Sequence[LabelledText], is_high: Floats, log_odds: Floats, seed: int) -> HeldOutReport:
    lengths = log_lengths([text.text for text in texts])
    groups = sorted({text.group for text in texts})
    place = {group: index for index, group in enumerate(groups)}
    group_N = np.array([place[text.group] for text in texts])
    rng = np.random.default_rng(seed)
    accuracies, aucs = [], []
    for _ in range(_NUM_DRAWS):
        count_N = np.bincount(rng.integers(len(groups), size=len(groups)), minlength=len(groups))[group_N]
        weights = count_N.astype(np.float64)
        if min(weights @ is_high, weights @ (1 - is_high)) > 0:
            accuracies.append(accuracy_of(log_odds, is_high, weights))
            aucs.append(auc_of(log_odds, is_high, weights))
    ones = np.ones(len(texts))
    within = [correlation(log_odds[is_high == label], lengths[is_high == label]) for label in (0.0, 1.0)]
    return HeldOutReport(
        accuracy=_interval(accuracy_of(log_odds, is_high, ones), accuracies),
        auc=_interval(auc_of(log_odds, is_high, ones), aucs),
        score_with_length=correlation(log_odds, lengths),
        within_classes=sum(within) / 2,
        class_with_length=correlation(is_high, lengths),
        num_texts=len(texts),
        num_groups=len(groups),
    )


def accuracy_of(log_odds: Floats, is_high: Floats, weights: Floats) -> float:
    """Return the weighted share of texts whose class is found. Log-odds of exactly 0 count half."""
    right = np.where(log_odds == 0, 0.5, (log_odds > 0) == (is_high > 0))
    return float(weights @ right / weights.sum())


def auc_of(log_odds: Floats, is_high: Floats, weights: Floats) -> float:
    """Return the weighted share of pairs of a high and a low text in which the high text scores higher.

    Ties count half. Source: Mann and Whitney 1947; the pairs are counted by sorting.
    """
    order = np.argsort(log_odds, kind="stable")
    _, starts = np.unique(log_odds[order], return_index=True)
    highs = np.add.reduceat((weights * is_high)[order], starts)
    lows = np.add.reduceat((weights * (1 - is_high))[order], starts)
    won = highs @ (np.cumsum(lows) - lows / 2)
    return float(won / (highs.sum() * lows.sum()))


def _interval(value: float, draws: Sequence[float]) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975)) if draws else (0.0, 1.0)
    return Interval(value, float(low), float(high))


def _has_both(is_high: Floats, importance: Floats) -> bool:
    return min(float(importance @ is_high), float(importance @ (1 - is_high))) > 0
