"""What is checked of a profile before it is kept: that the experts are there, and that no two of them are opposed."""

from __future__ import annotations

from collections.abc import Callable

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile, check_sides
from personalized_soups.merging.planning.plan import dimensions_of


def library_check(library: ExpertLibrary) -> Callable[[Profile], None]:
    """Return a check of profiles against a library; what it needs of the experts is read once, here.

    The check raises DeclarationError for a name that is no expert's, and for weights on two sides of one dimension
    where the profile does not allow it.

    Raises:
        InputError: if an expert cannot be read.
    """
    experts = list(library.values())
    dimension_of = dimensions_of(experts)
    side_of = {expert.name: expert.side for expert in experts if expert.side is not None}

    def check(profile: Profile) -> None:
        library.check(profile)
        check_sides(profile, dimension_of, side_of)

    return check
