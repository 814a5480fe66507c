"""Who can be served: the experts that there are, the profiles that have a name, and the scales that experts have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from personalized_soups.adapters.library import Expert
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError, choose_from
from personalized_soups.merging.planning.plan import dimensions_of
from personalized_soups.mixing.mixture import LayerWeights, Row, Who, checked_number, checked_weight, row_of

Names = str | Sequence[str]


class ProfileRegistry:
    """Turns profiles, as they are given, into rows of weights. Not safe between threads by itself."""

    def __init__(self) -> None:
        self._experts: tuple[str, ...] = ()
        self._dimension_of: Mapping[str, str] = {}
        self._side_of: Mapping[str, str] = {}
        self._profiles: dict[str, Row] = {}
        self._scales: dict[str, float] = {}

    @property
    def profiles(self) -> Mapping[str, Row]:
        """The weights that names stand for."""
        return MappingProxyType(self._profiles)

    def check_new(self, names: Sequence[str]) -> None:
        """Raise if a profile has a name that an expert is to have.

        Raises:
            UsageError: naming it.
        """
        for name in names:
            if name in self._profiles:
                raise UsageError(
                    f"a profile is called {name!r}",
                    where="name",
                    mend="give the expert another name: add_expert(..., name=)",
                )

    def put(self, experts: Mapping[str, Expert]) -> None:
        """Know these experts and no others; the scales of those that are gone are forgotten."""
        self._experts = tuple(experts)
        self._dimension_of = dimensions_of(list(experts.values()))
        self._side_of = {name: expert.side for name, expert in experts.items() if expert.side is not None}
        self._scales = {name: scale for name, scale in self._scales.items() if name in experts}

    def row(self, who: Who) -> Row:
        """Return the weights of somebody, without the experts' scales.

        Raises:
            DeclarationError, UsageError: as row_of.
        """
        return row_of(who, self._experts, self._profiles, self._dimension_of, self._side_of)

    def row_of_adapters(self, names: Names, weights: float | LayerWeights | Sequence[float | LayerWeights]) -> Row:
        """Return the weights of experts that are listed, one weight for all or one for each.

        Raises:
            UsageError: if an expert is unknown, or there are not as many weights as names.
            DeclarationError: if a weight is no finite number.
        """
        listed = [names] if isinstance(names, str) else list(names)
        each = list(weights) if isinstance(weights, Sequence) else [weights] * len(listed)
        if len(each) != len(listed):
            raise UsageError(
                f"{len(each)} weights for {len(listed)} adapters", where="weights", mend="give one weight for each name"
            )
        for name in listed:
            self.check_expert(name)
        return Row({name: checked_weight(weight, f"weights.{name}") for name, weight in zip(listed, each, strict=True)})

    def scaled(self, row: Row) -> Row:
        """Return a row as it is computed: each weight times its expert's scale."""
        return row.scaled(self._scales)

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply an expert's weight from now on.

        Raises:
            UsageError: if there is no such expert.
            DeclarationError: if the scale is no finite number.
        """
        self.check_expert(name)
        self._scales[name] = checked_number(scale, f"scale of {name}")

    def add(self, profile: Profile, name: str) -> None:
        """Let a name stand for a profile.

        Raises:
            DeclarationError, UsageError: as `row`; UsageError if an expert is called so.
        """
        if name in self._experts:
            raise UsageError(f"an expert is called {name!r}", where="name", mend="give the profile another name")
        self._profiles[name] = self.row(profile)

    def remove(self, name: str) -> None:
        """Forget a name.

        Raises:
            UsageError: if it stands for nobody.
        """
        if self._profiles.pop(name, None) is None:
            raise UsageError(f"no profile is called {name!r}", where="profiles", mend=choose_from(name, self._profiles))

    def check_expert(self, name: str) -> None:
        """Raise if there is no such expert.

        Raises:
            UsageError: with the nearest name.
        """
        if name not in self._experts:
            raise UsageError(f"no expert is called {name!r}", where="experts", mend=choose_from(name, self._experts))
