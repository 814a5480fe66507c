from __future__ import annotations

import subprocess
import sys

import pytest

import personalized_soups


def test_public_names_are_those_of_their_modules() -> None:
    from personalized_soups.declare.profile import Profile, load_profile
    from personalized_soups.errors import SoupError
    from personalized_soups.tiny import BASE_FOLDER

    assert personalized_soups.Profile is Profile
    assert personalized_soups.load_profile is load_profile
    assert personalized_soups.SoupError is SoupError
    assert personalized_soups.TINY_BASE is BASE_FOLDER


@pytest.mark.parametrize("name", personalized_soups.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(personalized_soups, name) is not None
    assert name in dir(personalized_soups)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'blend'"):
        _ = personalized_soups.blend


def test_importing_the_package_and_what_people_declare_loads_no_torch() -> None:
    code = (
        "import sys, personalized_soups as p; assert 'pydantic' not in sys.modules;"
        "p.MergeOptions, p.Profile, p.Catalogue, p.load, p.TINY_BASE;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
