"""The check of a profile before it is stored: its experts exist, and no two of them are opposed."""

from __future__ import annotations

from collections.abc import Callable

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule


def library_check(library: ExpertLibrary) -> Callable[[Profile], None]:
    """Return a function that checks a profile against a library. The experts' records are read once, here.

    The returned function raises DeclarationError for an unknown expert, and for weights on two sides of one dimension
    in a profile without `allow_opposed: true`.

    Raises:
        InputError: if an expert cannot be read.
    """
    sides = SideRule.of(library.values())

    def check(profile: Profile) -> None:
        library.check(profile)
        sides.check(profile)

    return check
