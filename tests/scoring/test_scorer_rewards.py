"""Scorers as rewards: the values of the scorers, invalid answers, and the digest."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from personalized_soups import Catalogue, load, shipped_recipe
from personalized_soups.declare.loader import load_text
from personalized_soups.errors import DeclarationError
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.scorer_rewards import ScorerRewards
from personalized_soups.scoring.scorers import Scored, scorer_of
from personalized_soups.tiny import scorers

PROMPT = "How do I clean an old kettle?"
ANSWERS = [
    "Wash the old kettle in warm water and soap. Rub it dry with a towel. You are doing great, my friend!",
    "Wash the old kettle in warm water and soap. Leave me alone now.",
    "Wash the old lamp.",
    "kettle soap soap",
    "",
]
ITEMS = [TextItem(PROMPT, answer) for answer in ANSWERS]


@pytest.fixture
def catalogue() -> Catalogue:
    return load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)


def test_a_dimension_has_the_value_of_its_scorer(catalogue: Catalogue) -> None:
    rewards = ScorerRewards(catalogue)
    assert rewards.names == ("expertise", "informativeness", "style", "valid")
    got = rewards.features(ITEMS)
    valid = [scorers.is_valid(*item) for item in ITEMS]
    assert valid == [True, True, False, False, False]
    for column, scorer in enumerate((scorers.expertise, scorers.informativeness, scorers.style)):
        values = [scorer(*item).value for item in ITEMS[:2]]
        assert got[:, column].tolist() == [*values, 0.5, 0.5, 0.5]
    assert got[:, 3].tolist() == [1, 1, 0, 0, 0]
    assert got[0, 2] > 0.9
    assert got[1, 2] < 0.1
    assert rewards.features([]).shape == (0, 4)


def test_weights_express_the_score_toward_each_side(catalogue: Catalogue) -> None:
    """`toward` gives invalid answers 0 for both sides; a weight of 0.5 for `valid` does the same."""
    features = ScorerRewards(catalogue).features(ITEMS)
    for column, (low, high) in enumerate(
        (("elementary", "expert"), ("concise", "informative"), ("unfriendly", "friendly"))
    ):
        for side, sign, end in ((low, -1.0, "low"), (high, 1.0, "high")):
            want = [scorer_of(catalogue, side)(*item).toward(end) for item in ITEMS]  # type: ignore[arg-type]
            got = sign * features[:, column] + 0.5 * features[:, 3]
            assert got - got[-1] == pytest.approx([value - want[-1] for value in want], abs=1e-15)


def test_a_function_replaces_a_scorer(catalogue: Catalogue) -> None:
    def loud(prompt: str, answer: str) -> Scored:
        return Scored(value=0.25, valid="kettle" in answer)

    rewards = ScorerRewards(catalogue, scorers={"style": loud})
    assert rewards.features(ITEMS)[:, 2].tolist() == [0.25, 0.25, 0.5, 0.25, 0.5]
    # valid for one scorer is not valid for all
    assert rewards.features(ITEMS)[:, 3].tolist() == [1, 1, 0, 0, 0]
    assert rewards.digest != ScorerRewards(catalogue).digest


def test_the_digest_covers_the_catalogue_and_the_files_of_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "lengths_of_tests.py"
    source = "from personalized_soups import Scored\ndef length(prompt, answer):\n    return Scored(0.5, True)\n"
    module.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (
        "dimensions: {size: {about: Size., scorer: {kind: python, function: 'lengths_of_tests:length'}, "
        "sides: {short: {instruction: Be short., end: low}, long: {instruction: Be long., end: high}}}}"
    )
    digest = ScorerRewards(load_text(text, Catalogue, "c.yaml")).digest
    assert ScorerRewards(load_text(text, Catalogue, "c.yaml")).digest == digest
    other = ScorerRewards(load_text(text.replace("Size.", "Length."), Catalogue, "c.yaml")).digest
    module.write_text(source.replace("0.5", "0.75"))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "lengths_of_tests")
    changed = ScorerRewards(load_text(text, Catalogue, "c.yaml")).digest
    assert len({digest, other, changed}) == 3


def test_a_catalogue_without_scorers_is_rejected() -> None:
    text = "dimensions: {size: {about: Size., sides: {short: {instruction: Be short., end: low}}}}"
    with pytest.raises(DeclarationError, match="no dimension has a scorer") as caught:
        ScorerRewards(load_text(text, Catalogue, "c.yaml"))
    assert caught.value.where == "c.yaml:1: dimensions"
    text = text.replace("size:", "valid:").replace("sides:", "scorer: {kind: length, low: 1, high: 9}, sides:")
    with pytest.raises(DeclarationError, match="a dimension is called 'valid'"):
        ScorerRewards(load_text(text, Catalogue, "c.yaml"))
