"""Personas: simulated users, as people write them."""

from __future__ import annotations

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load, load_text
from personalized_soups.declare.persona import Persona
from personalized_soups.declare.shipped import recipes_folder, shipped_recipe
from personalized_soups.errors import DeclarationError

CATALOGUE = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)


def test_every_shipped_persona_fits_the_tiny_catalogue() -> None:
    names = set()
    for path in sorted((recipes_folder() / "personas").glob("*.yaml")):
        persona = load(path, Persona)
        persona.by_dimension(CATALOGUE)
        names.add(persona.name)
    assert names == {"brief", "changing", "comma", "hesitant"}


def test_weights_of_sides_and_dimensions_add_up() -> None:
    persona = Persona(weights={"friendly": 1.0, "unfriendly": 0.25, "style": 0.5, "concise": 2.0})
    assert persona.by_dimension(CATALOGUE) == {"style": 1.25, "informativeness": -2.0}


def test_a_change_replaces_the_weights_after_its_answers() -> None:
    persona = load(shipped_recipe("personas/changing.yaml"), Persona)
    assert persona.by_dimension(CATALOGUE, num_answers=9) == {"style": 1.0, "informativeness": -0.5}
    assert persona.by_dimension(CATALOGUE, num_answers=10) == {"style": -1.0, "informativeness": -0.5}


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("weights: {freindly: 1}", "persona.yaml:1: weights.freindly", "freindly"),
        (
            "weights: {style: 1}\nchange:\n  after: 0\n  weights: {cold: 1}",
            "persona.yaml:4: change.weights.cold",
            "cold",
        ),
    ],
)
def test_an_unknown_side_is_named_with_its_line(text: str, where: str, words: str) -> None:
    with pytest.raises(DeclarationError, match=words) as caught:
        load_text(text, Persona, "persona.yaml").by_dimension(CATALOGUE)
    assert caught.value.where == where


@pytest.mark.parametrize(
    "text",
    [
        "weights: {style: 0}",
        "name: empty",
        "weights: {style: 1}\nnoise: 0.5",
        "weights: {style: 1}\ntemperature: -1",
        "weights: {style: 1}\nskips: 1",
        "weights: {style: .inf}",
        "weights: {style: 1}\nties_within: -0.1",
    ],
)
def test_personas_without_a_taste_or_with_impossible_numbers_are_rejected(text: str) -> None:
    with pytest.raises(DeclarationError, match=r"persona\.yaml"):
        load_text(text, Persona, "persona.yaml")
