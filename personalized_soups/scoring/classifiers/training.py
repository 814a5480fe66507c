"""Train a classifier on texts of two classes.

Shapes: N = texts, F = features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from personalized_soups.scoring.classifiers.classifier import Classifier, StateFeatures, StatesOf
from personalized_soups.scoring.classifiers.held_out import (
    HeldOutReport,
    choose_penalty,
    held_out_report,
    importance_of,
    labels_of,
)
from personalized_soups.scoring.classifiers.labelled_texts import LabelledText, check_texts, num_per_class
from personalized_soups.scoring.classifiers.logistic import fit_logistic
from personalized_soups.scoring.classifiers.rows import DenseRows, Floats, Ints, Rows
from personalized_soups.scoring.classifiers.vocabulary import Vocabulary

_NUM_LEAST = 10


def train_classifier(
    texts: Sequence[LabelledText],
    *,
    states_of: StatesOf | None = None,
    states_digest: str = "",
    about: dict[str, Any] | None = None,
    keep_length: bool = False,
    seed: int = 0,
) -> tuple[Classifier, HeldOutReport]:
    """Train a classifier, and measure classifiers of the same kind on held-out texts.

    Args:
        texts: the texts of both classes. Repeated texts count once.
        states_of: computes the hidden states of texts, for a classifier of hidden states. Without it, the classifier
            counts words.
        states_digest: the digest of everything that the hidden states depend on.
        about: further facts for the classifier's record.
        keep_length: let the classifier learn the length. By default, the texts get importances with which both classes
            have the same distribution of lengths.
        seed: random seed of the folds and of the intervals.

    Returns:
        The classifier, which is trained on all texts, and the report on held-out texts.

    Raises:
        InputError: if a class has fewer than 10 different texts, or a text is in both classes, or the lengths of the
            classes hardly overlap and the length is not kept.
    """
    unique = check_texts(texts, num_least=_NUM_LEAST)
    importance = importance_of(unique, keep_length=keep_length)
    makers = _WordFeatures(unique) if states_of is None else _HiddenFeatures(unique, states_of, states_digest)
    report = held_out_report(makers.rows_of, unique, importance, seed=seed)
    everything = np.arange(len(unique), dtype=np.int64)
    penalty = choose_penalty(makers.rows_of, unique, everything, importance, seed=seed)
    features = makers.trained_on(everything)
    model = fit_logistic(makers.rows_of(everything, everything)[0], labels_of(unique), importance, penalty)
    facts = {
        **(about or {}),
        "texts": num_per_class(unique),
        "penalty": penalty,
        "keep_length": keep_length,
        "seed": seed,
        "held_out": asdict(report),
    }
    return Classifier(model, features, facts), report


class _WordFeatures:
    def __init__(self, texts: Sequence[LabelledText]) -> None:
        self._texts = [text.text for text in texts]

    def trained_on(self, train: Ints) -> Vocabulary:
        return Vocabulary.of([self._texts[index] for index in train])

    def rows_of(self, train: Ints, held: Ints) -> tuple[Rows, Rows]:
        vocabulary = self.trained_on(train)
        first, second = (vocabulary.rows([self._texts[index] for index in chosen]) for chosen in (train, held))
        return first, second


class _HiddenFeatures:
    def __init__(self, texts: Sequence[LabelledText], states_of: StatesOf, digest: str) -> None:
        self._states_of, self._digest = states_of, digest
        self._states_NF: Floats = states_of([(text.prompt, text.text) for text in texts])

    def trained_on(self, train: Ints) -> StateFeatures:
        states = self._states_NF[train]
        scale = states.std(axis=0) * np.sqrt(states.shape[1])
        return StateFeatures(self._states_of, self._digest, states.mean(axis=0), np.where(scale > 0, scale, 1.0))

    def rows_of(self, train: Ints, held: Ints) -> tuple[Rows, Rows]:
        features = self.trained_on(train)
        first, second = (
            DenseRows((self._states_NF[chosen] - features.centre) / features.scale) for chosen in (train, held)
        )
        return first, second
