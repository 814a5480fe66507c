"""The experts of a model, the profiles that have a name, and the scale of each expert."""

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

# One counter for all models of the process: weights that one model checked never pass as checked in another.
_VERSIONS = count()


class ProfileRegistry:
    """Resolves profiles into checked weights. Callers must hold a lock where several threads use one registry.

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
        """Replace the experts by these. Scales of experts that are not among them are dropped."""
        self._experts = tuple(experts)
        self._version = next(_VERSIONS)
        self._sides = SideRule.of(experts.values())
        self._scales = {name: scale for name, scale in self._scales.items() if name in experts}

    def resolve(self, profile: ProfileLike) -> ExpertWeights:
        """Return checked weights, without the experts' scales.

        Weights that this method returned are returned as they are, as long as the experts are the same.

        Args:
            profile: a profile, weights by expert, the name of a profile or of an expert, resolved weights, or None for
                the base alone.

        Raises:
            DeclarationError: for an unknown expert, opposed sides, or a weight that is not a finite number.
            UsageError: for an unknown name, or a profile with a method other than linear or with a rank.
        """
        if profile is None:
            return ExpertWeights(version=self._version)
        if isinstance(profile, ExpertWeights):
            # The fast path of a server: names were checked when the request came in.
            if profile.version == self._version:
                return profile
            # Experts have changed since. Opposed sides were allowed or rejected when the weights were resolved.
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
                f"a profile cannot be a {type(profile).__name__}",
                where="profiles",
                mend='give a Profile, a dict of weights ({"friendly": 0.6}), a name, or None for the base alone',
            )
        return self._of_weights(profile)

    def resolve_adapters(
        self, names: Names, weights: float | LayerWeights | Sequence[float | LayerWeights]
    ) -> ExpertWeights:
        """Return the weights of the named experts: one weight for all of them, or one for each.

        Raises:
            UsageError: for an unknown expert, or if there are not as many weights as names.
            DeclarationError: for a weight that is not a finite number.
        """
        listed = [names] if isinstance(names, str) else list(names)
        numbers = list(weights) if isinstance(weights, Sequence) else [weights] * len(listed)
        if len(numbers) != len(listed):
            raise UsageError(
                f"{len(numbers)} weights for {len(listed)} adapters",
                where="weights",
                mend="give one weight for each name",
            )
        for name in listed:
            self.check_expert(name)
        checked = {
            name: checked_weight(weight, f"weights.{name}") for name, weight in zip(listed, numbers, strict=True)
        }
        return ExpertWeights(checked, self._version)

    def scaled(self, weights: ExpertWeights) -> ExpertWeights:
        """Return the weights times the experts' scales, as the gates hold them."""
        return weights.scaled(self._scales)

    def resolve_scaled(self, profile: ProfileLike) -> ExpertWeights:
        """Return checked weights times the experts' scales. Raises as `resolve`."""
        return self.scaled(self.resolve(profile))

    def set_scale(self, name: str, scale: float) -> None:
        """Set the factor by which every weight of an expert is multiplied.

        Raises:
            UsageError: for an unknown expert.
            DeclarationError: if the scale is not a finite number.
        """
        self.check_expert(name)
        self._scales[name] = checked_number(scale, f"scale of {name}")

    def has_expert(self, name: str) -> bool:
        """Return whether an expert has that name."""
        return name in self._experts

    def check_expert(self, name: str) -> None:
        """Raise if no expert has that name.

        Raises:
            UsageError: with the nearest name.
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
            f"no profile and no expert is called {name!r}",
            where="profiles",
            mend=choose_from(name, [*self.named, *self._experts]),
        )

    def _of_weights(self, weights: Weights) -> ExpertWeights:
        self._check_known(weights, lambda name: f"weights.{name}")
        checked = {
            name: weight if callable(weight) else checked_weight(weight, f"weights.{name}")
            for name, weight in weights.items()
        }
        # A weight of 0 opposes nothing. A schedule counts, because it may become another number.
        used = [name for name, weight in checked.items() if weight != 0]
        match = self._sides.opposed(used)
        if match is not None:
            raise DeclarationError(
                f"{match.first!r} and {match.second!r} are two sides of one dimension, {match.dimension!r}",
                where=f"weights of {', '.join(used)}",
                mend="take one of them out, or give Profile(weights={...}, allow_opposed=True)",
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
            f"the profile asks for the method {profile.method}; a mixture is always linear",
            where=profile.place("method"),
            mend="leave `method` out, or merge: psoups merge",
        )
    if profile.rank is not None:
        raise UsageError(
            f"the profile asks for rank {profile.rank}; a mixture is exact and has no rank",
            where=profile.place("rank"),
            mend="leave `rank` out, or merge: psoups merge",
        )
