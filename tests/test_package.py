from __future__ import annotations

import pytest

import personalized_soups


def test_public_names_are_found_where_they_live() -> None:
    from personalized_soups.declare.profile import Profile, load_profile
    from personalized_soups.errors import SoupError

    assert personalized_soups.Profile is Profile
    assert personalized_soups.load_profile is load_profile
    assert personalized_soups.SoupError is SoupError


@pytest.mark.parametrize("name", personalized_soups.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(personalized_soups, name) is not None
    assert name in dir(personalized_soups)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'blend'"):
        _ = personalized_soups.blend
