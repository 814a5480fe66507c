"""`Classifier`: a logistic regression on the features of a text, in memory and in a folder.

Shapes: N = texts, F = features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from blake3 import blake3
from pydantic import Field

from personalized_soups.declare.declared import Declared
from personalized_soups.declare.record import read_record
from personalized_soups.errors import FileFormatError, IncompatibleExpertsError
from personalized_soups.files.atomic import new_folder
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import CLASSIFIER_FILE, CLASSIFIER_WEIGHTS_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.writer import spec_of, write_safetensors
from personalized_soups.scoring.classifiers.logistic import LogisticModel
from personalized_soups.scoring.classifiers.rows import DenseRows, Floats, Rows
from personalized_soups.scoring.classifiers.vocabulary import VOCABULARY_VERSION, Vocabulary

# Returns [N, H], float64: the hidden state of each text, which is an answer to a prompt.
StatesOf: TypeAlias = Callable[[Sequence[tuple[str, str]]], Floats]

_MAX_RECORD_BYTES = 64 << 20
_AGAIN = "train the classifier again with psoups scorer train"


@dataclass(frozen=True, eq=False, slots=True)
class StateFeatures:
    """The hidden states of a base model as features, each shifted and scaled.

    Attributes:
        states_of: computes the hidden states.
        digest: a digest of everything that the hidden states depend on.
        centre: [F], the mean of each feature over the texts of the training.
        scale: [F], the standard deviation times the square root of F. So the features have a norm of about 1, as those
            of words have, and the same penalties suit both.
    """

    states_of: StatesOf
    digest: str
    centre: Floats
    scale: Floats

    def rows(self, items: Sequence[tuple[str, str]]) -> DenseRows:
        """Return [N, F]: the features of each text, which is given with its prompt."""
        return DenseRows((self.states_of(items) - self.centre) / self.scale)


class ClassifierRecord(Declared):
    """The file `classifier.json`."""

    format: Literal["personalized_soups classifier 1"] = "personalized_soups classifier 1"
    kind: Literal["words", "states"] = Field(description="words: counts of words. states: a base's hidden states.")
    vocabulary_version: int = Field(description="The version of the rule that divides a text into terms.")
    terms: tuple[str, ...] = Field(description="The terms that are counted. Empty for the kind `states`.")
    features_digest: str = Field(description="The digest of the base and the settings of the kind `states`.")
    about: dict[str, Any] = Field(description="How the classifier was trained, and its figures on held-out texts.")
    digest: str = Field(description="The digest of the terms and of the tensors.")
    blake3: str = Field(description="The BLAKE3 digest of classifier.safetensors.")
    files: tuple[str, ...] = Field(description="All files of the folder.")


@dataclass(frozen=True, eq=False)
class Classifier:
    """Rates how much a text resembles the high class rather than the low class.

    Attributes:
        model: the log-odds of the high class as a linear function of the features.
        features: makes the features of texts.
        about: how the classifier was trained, and its figures on held-out texts.

    Example:
        >>> classifier = Classifier(LogisticModel(np.array([2.0, -2.0]), 0.0), Vocabulary(("glad", "whatever")))
        >>> classifier.values([("How are you?", "I am glad.")]).round(2).tolist()
        [0.88]
    """

    model: LogisticModel
    features: Vocabulary | StateFeatures
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """A hex digest that changes when the value of a text may change."""
        return _digest(self.features, self.model)

    def values(self, items: Sequence[tuple[str, str]]) -> Floats:
        """Return [N], float64, in [0, 1]: the probability that each text is of the high class.

        Args:
            items: prompts with answers. A classifier of words ignores the prompts.
        """
        log_odds = self.model.log_odds(_rows(self.features, items))
        values: Floats = 1.0 / (1.0 + np.exp(np.clip(-log_odds, -700, 700)))
        return values

    def save(self, folder: Path | str, *, overwrite: bool = False) -> ClassifierRecord:
        """Write the classifier to a new folder, all or nothing, and return its record.

        Raises:
            OutputExistsError: if the folder exists and may not be replaced.
            RunError: if the disk is full.
        """
        features = self.features
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in _arrays(self).items()}
        with new_folder(folder, overwrite) as scratch:
            specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
            write_safetensors(scratch / CLASSIFIER_WEIGHTS_FILE, specs, tensors.items())
            record = ClassifierRecord(
                kind="words" if isinstance(features, Vocabulary) else "states",
                vocabulary_version=VOCABULARY_VERSION,
                terms=features.terms if isinstance(features, Vocabulary) else (),
                features_digest="" if isinstance(features, Vocabulary) else features.digest,
                about=dict(self.about),
                digest=self.digest,
                blake3=digest_file(scratch / CLASSIFIER_WEIGHTS_FILE),
                files=(CLASSIFIER_FILE, CLASSIFIER_WEIGHTS_FILE),
            )
            text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
            (scratch / CLASSIFIER_FILE).write_text(text + "\n", encoding="utf-8")
        return record


def open_classifier(
    folder: Path | str, *, states: Callable[[ClassifierRecord], tuple[StatesOf, str]] | None = None
) -> Classifier:
    """Read a folder that `Classifier.save` wrote.

    Args:
        folder: the folder.
        states: for a classifier of hidden states: returns the function that computes them, and its digest.

    Raises:
        FileFormatError: if a file is missing or damaged, or terms are counted by another rule now.
        IncompatibleExpertsError: if the hidden states are not those that the classifier was trained with.
    """
    record = read_classifier_record(folder)
    path = Path(folder) / CLASSIFIER_WEIGHTS_FILE
    if not path.is_file() or digest_file(path) != record.blake3:
        raise FileFormatError(
            f"the file is missing, or it is not the one that {CLASSIFIER_FILE} describes",
            where=str(path),
            mend=f"copy the whole folder again, or {_AGAIN}",
        )
    file = SafetensorsFile.open(path)
    arrays = {name: file.tensor(name).numpy().copy() for name in file.entries}
    features: Vocabulary | StateFeatures = Vocabulary(record.terms)
    if record.kind == "states":
        states_of, digest = _states_of(record, folder, states)
        features = StateFeatures(states_of, digest, arrays["centre"], arrays["scale"])
    model = LogisticModel(arrays["weights"], float(arrays["intercept"][0]))
    if _digest(features, model) != record.digest:
        raise FileFormatError(
            f"the terms in {CLASSIFIER_FILE} are not those of the classifier",
            where=str(Path(folder) / CLASSIFIER_FILE),
            mend=f"copy the whole folder again, or {_AGAIN}",
        )
    return Classifier(model, features, record.about)


def read_classifier_record(folder: Path | str) -> ClassifierRecord:
    """Return the record of a classifier.

    Raises:
        FileFormatError: if the folder holds no classifier, the record is damaged, or terms are counted by another rule.
        InputError: if the file cannot be read.
    """
    path = Path(folder) / CLASSIFIER_FILE
    if not path.is_file():
        raise FileFormatError(
            f"the folder holds no classifier: {CLASSIFIER_FILE} is missing",
            where=str(folder),
            mend="give a folder that psoups scorer train wrote",
        )
    record = read_record(ClassifierRecord, path, what="classifier", max_bytes=_MAX_RECORD_BYTES, mend=_AGAIN)
    if record.kind == "words" and record.vocabulary_version != VOCABULARY_VERSION:
        raise FileFormatError(
            f"the classifier has the vocabulary version {record.vocabulary_version}, but this version of the package "
            f"divides texts into terms by version {VOCABULARY_VERSION}",
            where=str(path),
            mend=_AGAIN,
        )
    return record


def _states_of(
    record: ClassifierRecord,
    folder: Path | str,
    states: Callable[[ClassifierRecord], tuple[StatesOf, str]] | None,
) -> tuple[StatesOf, str]:
    if states is None:
        raise FileFormatError(
            "the classifier needs the hidden states of a base model",
            where=str(folder),
            mend="give the base, or train a classifier of words",
        )
    states_of, digest = states(record)
    if digest != record.features_digest:
        made = ", ".join(f"{key} {value}" for key, value in record.about.items() if isinstance(value, str))
        raise IncompatibleExpertsError(
            f"the classifier was trained with other hidden states ({made})",
            where=str(folder),
            mend=f"give the base and the dtype that it was trained with, or {_AGAIN}",
        )
    return states_of, digest


def _rows(features: Vocabulary | StateFeatures, items: Sequence[tuple[str, str]]) -> Rows:
    if isinstance(features, Vocabulary):
        return features.rows([answer for _, answer in items])
    return features.rows(items)


def _arrays(classifier: Classifier) -> dict[str, Floats]:
    arrays = {"weights": classifier.model.weights, "intercept": np.array([classifier.model.intercept])}
    if isinstance(classifier.features, StateFeatures):
        arrays |= {"centre": classifier.features.centre, "scale": classifier.features.scale}
    return arrays


def _digest(features: Vocabulary | StateFeatures, model: LogisticModel) -> str:
    if isinstance(features, Vocabulary):
        head, arrays = ["classifier 1", VOCABULARY_VERSION, *features.terms], []
    else:
        head, arrays = ["classifier 1", features.digest], [features.centre, features.scale]
    hasher = blake3(json.dumps(head).encode())
    for array in (model.weights, np.array([model.intercept]), *arrays):
        hasher.update(np.ascontiguousarray(array).tobytes())
    return str(hasher.hexdigest())
