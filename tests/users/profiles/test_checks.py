from __future__ import annotations

from pathlib import Path

import pytest

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError
from personalized_soups.users.profiles.checks import library_check
from personalized_soups.users.profiles.store import ProfileStore
from tests.experts import write_expert


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    for seed, name in enumerate(("elementary", "expert", "friendly")):
        write_expert(tmp_path / "experts" / name, seed=seed)
    return ExpertLibrary.open(tmp_path / "experts")


@pytest.mark.parametrize(
    ("weights", "fields", "what"),
    [
        ({"frendly": 1.0}, {}, "no expert is called 'frendly'"),
        ({"elementary": 0.5, "expert": 0.5}, {}, "two sides of one dimension"),
        ({"elementary": 0.5, "expert": 0.5}, {"allow_opposed": True}, None),
        ({"elementary": 0.5, "friendly": 0.5}, {}, None),
    ],
)
def test_profiles_are_checked_against_the_library_before_they_are_written(
    tmp_path: Path, library: ExpertLibrary, weights: dict[str, float], fields: dict[str, bool], what: str | None
) -> None:
    profile = Profile(user="u1", weights=weights, allow_opposed=fields.get("allow_opposed", False))
    with ProfileStore.open(tmp_path / "profiles.db", check=library_check(library)) as store:
        if what is None:
            store.put(profile)
            assert store.get("u1").profile == profile
            return
        for write in (lambda: store.put(profile), lambda: store.put_many([profile])):
            with pytest.raises(DeclarationError, match=what):
                write()
        assert list(store.all()) == []
