from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from personalized_soups.declare.dimension import (
    Catalogue,
    LengthScorer,
    MarkersScorer,
    PluginScorer,
    PythonScorer,
    ReadabilityScorer,
)
from personalized_soups.declare.loader import dump, load, load_data, load_text
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import DeclarationError

# Personalized Soups, arXiv:2310.11564, table 1, and the two sides that the paper adds afterwards
LABELS = {
    "elementary": "P1A",
    "expert": "P1B",
    "concise": "P2A",
    "informative": "P2B",
    "friendly": "P3A",
    "unfriendly": "P3B",
    "sassy": "P3C",
    "sarcastic": "P3D",
}


@pytest.fixture(scope="module")
def psoups() -> Catalogue:
    return load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)


def catalogue(scorer: dict[str, Any] | None = None, **sides: dict[str, Any]) -> Catalogue:
    named = {name: {"instruction": "Do so.", **side} for name, side in (sides or {"a": {}}).items()}
    dimension = {"about": "x", "sides": named, **({"scorer": scorer} if scorer else {})}
    return load_data({"dimensions": {"d": dimension}}, Catalogue, "test")


def test_the_shipped_catalogue_holds_the_papers_eight_sides(psoups: Catalogue) -> None:
    assert {name: side.label for name, side in psoups.sides.items()} == LABELS
    assert list(psoups.dimensions) == ["expertise", "informativeness", "style"]
    assert len({side.instruction for side in psoups.sides.values()}) == len(LABELS)


def test_the_tiny_catalogue_has_the_same_names_for_its_six_sides() -> None:
    tiny = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
    assert {name: side.label for name, side in tiny.sides.items()} == {
        name: label for name, label in LABELS.items() if label not in {"P3C", "P3D"}
    }
    for name in tiny.sides:
        scorer = tiny.scorer_of(name)
        assert isinstance(scorer, PythonScorer)
        assert scorer.function == f"personalized_soups.tiny.scorers:{tiny.dimension_of(name)}"


@pytest.mark.parametrize("recipe", ["dimensions/psoups.yaml", "dimensions/smollm2.yaml", "dimensions/tiny.yaml"])
def test_two_sides_of_a_dimension_want_opposite_ends(recipe: str) -> None:
    sides = load(shipped_recipe(recipe), Catalogue).sides
    for low, high in (("elementary", "expert"), ("concise", "informative"), ("unfriendly", "friendly")):
        assert (sides[low].end, sides[high].end) == ("low", "high")


def test_sides_are_found_by_name(psoups: Catalogue) -> None:
    dimension, side = psoups.side("sassy")
    assert (dimension, side.label) == ("style", "P3C")
    assert psoups.dimension_of("expert") == "expertise"
    assert psoups.dimension_of("someone") is None


def test_an_unknown_side_gets_the_nearest_name(psoups: Catalogue) -> None:
    with pytest.raises(DeclarationError) as caught:
        psoups.side("freindly")
    assert (caught.value.what, caught.value.mend) == ("unknown side 'freindly'", "did you mean 'friendly'?")
    assert "psoups.yaml:" in caught.value.where


def test_a_sides_own_scorer_wins(psoups: Catalogue) -> None:
    assert psoups.scorer_of("friendly") is psoups.dimensions["style"].scorer
    assert psoups.scorer_of("sassy") is psoups.sides["sassy"].scorer
    assert psoups.scorer_of("expert") == ReadabilityScorer(kind="readability", low=4, high=14)


def test_a_side_that_nothing_scores_is_told_when_its_scorer_is_asked_for() -> None:
    with pytest.raises(DeclarationError) as caught:
        catalogue().scorer_of("a")
    assert (caught.value.what, caught.value.where) == ("the side 'a' has no scorer", "test: dimensions.d.sides.a")


def test_each_kind_of_scorer_is_read() -> None:
    for scorer, want in (
        ({"kind": "markers", "high": ["a"], "low": []}, MarkersScorer(kind="markers", high=("a",), low=())),
        ({"kind": "length", "low": 1, "high": 2}, LengthScorer(kind="length", low=1, high=2)),
        ({"kind": "readability", "low": -1.0, "high": 2}, ReadabilityScorer(kind="readability", low=-1.0, high=2.0)),
        ({"kind": "python", "function": "a.b:c"}, PythonScorer(kind="python", function="a.b:c")),
        ({"kind": "plugin", "name": "tone-v2"}, PluginScorer(kind="plugin", name="tone-v2")),
    ):
        assert catalogue(scorer).scorer_of("a") == want


@pytest.mark.parametrize(
    ("scorer", "what", "mend"),
    [
        ({"kind": "length", "low": 9, "high": 3}, "low (9) is not below high (3)", "exchange"),
        ({"kind": "readability", "low": 5, "high": 5}, "low (5) is not below high (5)", "exchange"),
        ({"kind": "markers", "high": ["So"], "low": ["so"]}, "'so' is under both", "remove it from"),
        ({"kind": "markers", "high": [], "low": ["so"]}, "at least 1", "give at least one"),
        ({"kind": "markers", "high": ["so", " "], "low": []}, "pattern", "form"),
        ({"kind": "lenght", "low": 1, "high": 2}, "'lenght' is not a valid", "did you mean 'length'?"),
        ({"kind": "python", "function": "os.system"}, "pattern", "form"),
        ({"kind": "plugin", "name": "os:system"}, "pattern", "form"),
        ({"low": 1}, "discriminator", ""),
        ({"kind": "length", "low": 1, "hihg": 2, "high": 3}, "unknown key 'hihg'", "did you mean 'high'?"),
    ],
)
def test_scorers_that_cannot_be_are_refused(scorer: dict[str, Any], what: str, mend: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        catalogue(scorer)
    assert what in caught.value.what
    assert mend in caught.value.mend
    assert "dimensions.d.scorer" in caught.value.where


def test_names_and_labels_are_unique_over_the_catalogue() -> None:
    text = """
dimensions:
  d: {about: x, sides: {a: {label: A, instruction: x}}}
  e: {about: x, sides: {%s: {label: %s, instruction: x}}}
"""
    for name, label, what in (("a", "B", "the side 'a'"), ("b", "A", "the label 'A'")):
        with pytest.raises(DeclarationError, match=f"{what} occurs more than once"):
            load_text(text % (name, label), Catalogue, "file.yaml")


def test_a_label_is_optional() -> None:
    text = """
dimensions:
  d:
    about: x
    sides:
      a: {instruction: x}
      b: {instruction: y}
      c: {label: C, instruction: z}
      e: {label: null, instruction: z}
"""
    found = load_text(text, Catalogue, "file.yaml")
    assert [side.label for side in found.sides.values()] == [None, None, "C", None]


def test_an_empty_label_is_refused() -> None:
    with pytest.raises(DeclarationError, match="at least 1"):
        catalogue(a={"label": ""})


@pytest.mark.parametrize("name", ["a b", "a=b", "a,b", "../a", "-a", "a/b"])
def test_names_that_are_no_folder_or_option_are_refused(name: str) -> None:
    with pytest.raises(DeclarationError, match="pattern"):
        catalogue(**{name: {}})


def test_a_dimension_is_about_length_by_its_scorer_or_its_flag() -> None:
    dimensions = {
        "size": {"about": "x", "scorer": {"kind": "length", "low": 1, "high": 9}, "sides": {"a": {"instruction": "i"}}},
        "rhyme": {
            "about": "x",
            "about_length": True,
            "scorer": {"kind": "markers", "high": ["moon"], "low": []},
            "sides": {
                "b": {"instruction": "i"},
                "c": {"instruction": "i", "scorer": {"kind": "length", "low": 1, "high": 9}},
            },
        },
        "tone": {
            "about": "x",
            "scorer": {"kind": "classifier", "path": "tone"},
            "sides": {
                "d": {"instruction": "i"},
                "e": {"instruction": "i", "scorer": {"kind": "length", "low": 1, "high": 9}},
            },
        },
    }
    catalogue = load_data({"dimensions": dimensions}, Catalogue, "test")
    assert [side for side in catalogue.sides if catalogue.is_about_length(side)] == ["a", "b", "c", "e"]


def test_a_path_in_a_catalogue_starts_at_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "c.yaml"
    path.parent.mkdir()
    path.write_text(dump(load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)))
    catalogue = load(path, Catalogue)
    assert catalogue.relative_path("tone") == tmp_path / "deep" / "tone"
    assert catalogue.relative_path("/tone") == Path("/tone")
    assert load_data(catalogue.model_dump(mode="json"), Catalogue, "test").relative_path("tone") == Path("tone")
