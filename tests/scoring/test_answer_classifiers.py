from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.declare.dimension import Catalogue, ClassifierScorer
from personalized_soups.declare.loader import load, load_data
from personalized_soups.errors import DeclarationError, FileFormatError, IncompatibleExpertsError, InputError
from personalized_soups.scoring.answer_classifiers import open_answer_classifier, train_answer_classifier
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.classifiers.classifier import Classifier
from personalized_soups.scoring.classifiers.logistic import LogisticModel
from personalized_soups.scoring.classifiers.vocabulary import Vocabulary
from personalized_soups.scoring.hidden_states import HiddenStates
from personalized_soups.scoring.scorer_rewards import ScorerRewards
from personalized_soups.scoring.scorers import classifier_scorer, scorer_of

CATALOGUE = """dimensions:
  mood:
    about: How the answer sounds.
    scorer: {kind: classifier, path: tone}
    sides:
      glad: {instruction: Be glad.}
      cold: {instruction: Be cold., end: low}
"""
TONE = Classifier(LogisticModel(np.array([2.0, -2.0]), 0.0), Vocabulary(("glad", "whatever")))


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    path = tmp_path / "catalogues" / "mood.yaml"
    path.parent.mkdir()
    path.write_text(CATALOGUE)
    return load(path, Catalogue)


def test_a_catalogue_names_a_classifier_relative_to_its_own_file(catalogue: Catalogue, tmp_path: Path) -> None:
    TONE.save(tmp_path / "catalogues" / "tone")
    score = scorer_of(catalogue, "cold")
    sure = 1 / (1 + np.exp(-2.0))
    assert score("Hi", "I am glad.").value == pytest.approx(sure)
    assert score("Hi", "Whatever.").toward("low") == pytest.approx(sure)
    assert score("Hi", "Nothing known.").value == 0.5
    assert not score("Hi", "...").valid
    assert classifier_scorer(TONE)("Hi", "I am glad.").value == pytest.approx(sure)


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    TONE.save(tmp_path / "far")
    data = {"mood": {"about": "x", "scorer": {"kind": "classifier", "path": str(tmp_path / "far")}, "sides": {"glad": {"instruction": "Be glad."}}}}  # fmt: skip  # noqa: E501
    assert scorer_of(load_data({"dimensions": data}, Catalogue, "catalogue"), "glad")("", "glad").value > 0.8


def test_a_missing_folder_is_named_with_its_line(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="no folder") as caught:
        scorer_of(catalogue, "glad")
    assert caught.value.where == f"{tmp_path / 'catalogues' / 'mood.yaml'}:4: dimensions.mood.scorer.path"
    (tmp_path / "catalogues" / "tone").mkdir()
    with pytest.raises(FileFormatError, match="holds no classifier"):
        scorer_of(catalogue, "glad")
    with pytest.raises(ValueError, match="path"):
        ClassifierScorer(kind="classifier", path="")


def test_the_digest_of_rewards_changes_with_the_classifier(catalogue: Catalogue, tmp_path: Path) -> None:
    TONE.save(tmp_path / "catalogues" / "tone")
    before = ScorerRewards(catalogue).digest
    assert ScorerRewards(catalogue).digest == before
    other = Classifier(LogisticModel(np.array([2.0, -2.5]), 0.0), TONE.features)
    other.save(tmp_path / "catalogues" / "tone", overwrite=True)
    assert ScorerRewards(catalogue).digest != before


def _answers(num: int, word: str) -> list[TextItem]:
    return [TextItem(f"wash the kettle {n}", f"{word} the towel " + "rub " * n) for n in range(num)]


def test_a_classifier_of_hidden_states_is_opened_with_its_base(small_base: Path, tmp_path: Path) -> None:
    states = HiddenStates.open(small_base, device="cpu", pooling="mean")
    high, low = _answers(15, "dry"), _answers(15, "wash")
    classifier, report = train_answer_classifier(high, low, states=states)
    assert (report.num_texts, report.num_groups) == (30, 15)
    classifier.save(tmp_path / "tone")
    opened = open_answer_classifier(tmp_path / "tone")
    items = [*high[:2], *low[:2]]
    # The device is chosen again, so the hidden states may be rounded differently.
    np.testing.assert_allclose(opened.values(items), classifier.values(items), atol=1e-4)
    assert classifier.values(items)[:2].min() > classifier.values(items)[2:].max()

    path = tmp_path / "tone" / "classifier.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"about": row["about"] | {"pooling": "last"}}))
    with pytest.raises(IncompatibleExpertsError, match="other hidden states"):
        open_answer_classifier(tmp_path / "tone")
    path.write_text(json.dumps(row | {"about": {}}))
    with pytest.raises(FileFormatError, match="does not name its base"):
        open_answer_classifier(tmp_path / "tone")


def test_an_answer_of_both_ends_is_left_out() -> None:
    both = TextItem("wash the kettle", "No.")
    _, report = train_answer_classifier([both, *_answers(12, "dry")], [*_answers(12, "wash"), both])
    assert report.num_texts == 24
    with pytest.raises(InputError, match="the high class has 0"):
        train_answer_classifier([both], [both])
