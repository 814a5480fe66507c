"""The names of a model's experts, the scale of each expert, and the named profiles.

The registry resolves profiles: it checks a profile and returns its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

from personalized_soups.adapters.library import Expert
from personalized_soups.declare.expert_weights import (
    ExpertWeights,
    LayerWeights,
    ProfileLike,
    Weights,
    checked_number,
    checked_weight,
)
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import DeclarationError, UsageError, choose_from

Names = str | Sequence[str]

# All models of the process share one counter, so that no model takes weights for checked that another model checked.
_VERSIONS = count()


class ProfileRegistry:
    """Resolves profiles into checked weights. If several threads use one registry, callers must hold a lock.

    Attributes:
        named: the weights of each profile that has a name.
    """

    def __init__(self) -> None:
        self.named: dict[str, ExpertWeights] = {}
        self._experts: tuple[str, ...] = ()
        self._version = next(_VERSIONS)
        self._sides = SideRule()
        self._scales: dict[str, float] = {}

    def put(self, experts: Mapping[str, Expert]) -> None:
        """Replace the experts. Experts with a known name keep their scale. Scales of removed experts are dropped."""
        self._experts = tuple(experts)
        self._version = next(_VERSIONS)
        self._sides = SideRule.of(experts.values())
        self._scales = {name: scale for name, scale in self._scales.items() if name in experts}

    def resolve(self, profile: ProfileLike) -> ExpertWeights:
        """Return the checked weights of a profile, without the experts' scales.

        If `profile` is an earlier result of this method and the experts have not changed since, it is returned
        unchecked.

        Args:
            profile: a Profile, a dict of weights by expert, the name of a profile or an expert, resolved weights, or
                None for the base alone.

        Raises:
            DeclarationError: if an expert is unknown, sides are opposed, or a weight is not a finite number.
            UsageError: if a name is unknown, `profile` has a wrong type, or a profile has a rank or a method other than
                linear.
        """
        if profile is None:
            return ExpertWeights(version=self._version)
        if isinstance(profile, ExpertWeights):
            # A server takes this fast path, because it resolved the weights when the request came in.
            if profile.version == self._version:
                return profile
            # Experts have changed since then, so names are checked again. Sides are not: a profile may allow opposed
            # sides, but resolved weights do not record that.
            self._check_known(profile.weights, lambda name: f"weights.{name}")
            return ExpertWeights(profile.weights, self._version)
        if isinstance(profile, str):
            return self._of_name(profile)
        if isinstance(profile, Profile):
            _check_linear(profile)
            self._check_known(profile.weights, lambda name: profile.place("weights", name))
            self._sides.check(profile)
            return ExpertWeights.of(profile, self._experts, self._version)
        if not isinstance(profile, Mapping):
            raise UsageError(
                f"a profile must be a Profile, dict, str or None, but it is of type {type(profile).__name__}",
                where="profiles",
                mend='give a Profile, a dict of weights ({"friendly": 0.6}), a name, or None for the base alone',
            )
        return self._of_weights(profile)

    def resolve_adapters(
        self, names: Names, weights: float | LayerWeights | Sequence[float | LayerWeights]
    ) -> ExpertWeights:
        """Return checked weights for the named experts. `weights` is one weight for all names, or one for each.

        Raises:
            UsageError: if an expert is unknown, or if the numbers of names and weights differ.
            DeclarationError: if a weight is not a finite number.
        """
        listed = [names] if isinstance(names, str) else list(names)
        numbers = list(weights) if isinstance(weights, Sequence) else [weights] * len(listed)
        if len(numbers) != len(listed):
            raise UsageError(
                f"the number of weights is {len(numbers)}, but the number of names is {len(listed)}",
                where="weights",
                mend="give one weight for each name, or a single weight for all names",
            )
        for name in listed:
            self.check_expert(name)
        checked = {
            name: checked_weight(weight, f"weights.{name}") for name, weight in zip(listed, numbers, strict=True)
        }
        return ExpertWeights(checked, self._version)

    def scaled(self, weights: ExpertWeights) -> ExpertWeights:
        """Return `weights` multiplied by the experts' scales."""
        return weights.scaled(self._scales)

    def resolve_scaled(self, profile: ProfileLike) -> ExpertWeights:
        """Return the checked weights of a profile times the experts' scales. Raises the errors of `resolve`."""
        return self.scaled(self.resolve(profile))

    def set_scale(self, name: str, scale: float) -> None:
        """Set the factor by which every weight of an expert is multiplied.

        Raises:
            UsageError: if the expert is unknown.
            DeclarationError: if the scale is not a finite number.
        """
        self.check_expert(name)
        self._scales[name] = checked_number(scale, f"scale of {name}")

    def has_expert(self, name: str) -> bool:
        """Return whether an expert has that name."""
        return name in self._experts

    def check_expert(self, name: str) -> None:
        """Check that an expert has that name.

        Raises:
            UsageError: if no expert has the name. The error suggests the most similar name.
        """
        if name not in self._experts:
            raise UsageError(f"no expert is called {name!r}", where="experts", mend=choose_from(name, self._experts))

    def _of_name(self, name: str) -> ExpertWeights:
        if name in self.named:
            weights = self.named[name]
            # An expert of the profile may have been removed since the profile was added.
            self._check_known(weights.weights, lambda _: f"profile {name}")
            return weights
        if name in self._experts:
            return ExpertWeights({name: 1.0}, self._version)
        raise UsageError(
            f"no profile or expert is called {name!r}",
            where="profiles",
            mend=choose_from(name, [*self.named, *self._experts]),
        )

    def _of_weights(self, weights: Weights) -> ExpertWeights:
        self._check_known(weights, lambda name: f"weights.{name}")
        checked = {
            name: weight if callable(weight) else checked_weight(weight, f"weights.{name}")
            for name, weight in weights.items()
        }
        # An expert with weight 0 opposes no other expert. A schedule may return any number, so it counts as not 0.
        used = [name for name, weight in checked.items() if weight != 0]
        match = self._sides.opposed(used)
        if match is not None:
            raise DeclarationError(
                f"{match.first!r} and {match.second!r} are two sides of one dimension, {match.dimension!r}, "
                "but both have a weight",
                where=f"weights of {', '.join(used)}",
                mend="leave out one of the two, or allow both: Profile(weights={...}, allow_opposed=True)",
            )
        return ExpertWeights(checked, self._version)

    def _check_known(self, names: Mapping[str, object], place: Callable[[str], str]) -> None:
        unknown = [name for name in names if name not in self._experts]
        if unknown:
            raise DeclarationError(
                f"no expert is called {', '.join(map(repr, unknown))}",
                where=place(unknown[0]),
                mend=choose_from(unknown[0], self._experts),
            )


def _check_linear(profile: Profile) -> None:
    if profile.method != "linear":
        raise UsageError(
            f"the profile has the method {profile.method!r}, but a mixture is always linear",
            where=profile.place("method"),
            mend="leave `method` out of the profile, or merge the experts with psoups merge",
        )
    if profile.rank is not None:
        raise UsageError(
            f"the profile has rank {profile.rank}, but a mixture is exact and has no rank",
            where=profile.place("rank"),
            mend="leave `rank` out of the profile, or merge the experts with psoups merge",
        )
