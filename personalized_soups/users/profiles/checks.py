"""The check of a profile before it is stored: its experts must exist and must not be for opposed sides."""

from __future__ import annotations

from collections.abc import Callable

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule


def library_check(library: ExpertLibrary) -> Callable[[Profile], None]:
    """Return a function that checks whether a profile fits a library of experts.

    The returned function raises DeclarationError in two cases: if the profile names an unknown expert, or if it gives
    weights to two sides of one dimension without `allow_opposed: true`. The experts' records are read only once, when
    `library_check` is called.

    Raises:
        InputError: if the record of an expert cannot be read.
    """
    sides = SideRule.of(library.values())

    def check(profile: Profile) -> None:
        library.check(profile)
        sides.check(profile)

    return check
