"""The mixing weights of one request. They are checked once and then passed on without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real
from typing import TypeAlias

from blake3 import blake3

from personalized_soups.declare.profile import MAX_WEIGHT, Profile
from personalized_soups.errors import DeclarationError

# A weight for each layer. The keys are patterns of layer names, with the wildcards of file names, such as `*.q_proj`.
# A layer has the weight of the first pattern that matches its name, or 0 if no pattern matches.
LayerWeights: TypeAlias = Mapping[str, float]
Weight: TypeAlias = float | LayerWeights
# A function that returns the weight for a generated token, given the number of the token. The prompt is read with the
# weight for token 0.
Schedule: TypeAlias = Callable[[int], Weight]
Weights: TypeAlias = Mapping[str, Weight | Schedule]
# All values that can name a mixture: a profile, a weight for each expert, the name of a profile or of one expert,
# `ExpertWeights`, or None for the base model without experts.
ProfileLike: TypeAlias = "Profile | Weights | str | ExpertWeights | None"


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The checked mixing weight of each expert. An expert that is not named has weight 0.

    Attributes:
        weights: the weight of each expert, by the expert's name. A weight is a number, a mapping from layer patterns to
            numbers, or a function that returns the weight for the number of a generated token.
        version: the number of the set of experts against which the names were checked. It is None if the names were not
            checked.

    Example:
        >>> ExpertWeights.of(Profile(weights={"friendly": 3.0, "concise": 1.0}, normalize="sum")).weights
        {'friendly': 0.75, 'concise': 0.25}
    """

    weights: Mapping[str, Weight | Schedule] = field(default_factory=dict)
    version: int | None = field(default=None, compare=False)

    @classmethod
    def of(cls, profile: Profile, experts: Sequence[str] | None = None, version: int | None = None) -> ExpertWeights:
        """Return the weights of a profile. They are divided by their sum if the profile has `normalize: sum`.

        Args:
            profile: the profile. The names of its experts must have been checked.
            experts: the names of all experts. If given, the weights have the order of `experts` and use its string
                objects, so a million profiles do not store copies of the names.
            version: the number of the set of experts.
        """
        resolved = profile.resolved_weights()
        if experts is not None:
            resolved = {name: resolved[name] for name in experts if name in resolved}
        return cls(resolved, version)

    @property
    def is_scheduled(self) -> bool:
        """Whether the weight of at least one expert depends on the number of the generated token."""
        return any(callable(weight) for weight in self.weights.values())

    def at(self, step: int) -> dict[str, Weight]:
        """Return the weights for the generated token number `step`.

        Raises:
            DeclarationError: if the function of an expert returns a value that is not a weight.
        """
        return {
            name: checked_weight(weight(step), f"weights.{name} at step {step}") if callable(weight) else weight
            for name, weight in self.weights.items()
        }

    def scaled(self, scales: Mapping[str, float]) -> ExpertWeights:
        """Return a copy in which the weight of each expert in `scales` is multiplied by its scale."""
        if not scales.keys() & self.weights.keys():
            return self
        scaled = {name: _times(weight, scales.get(name, 1.0)) for name, weight in self.weights.items()}
        return ExpertWeights(scaled, self.version)

    def cache_key(self, stamps: Mapping[str, int], model: str) -> str:
        """Return a key for a cache of attention keys and values of prompts. The key has 32 hex digits.

        Prompts whose cache keys are equal may share cached keys and values. The key depends on the weights with which
        the prompt is read (step 0), on the version of each expert's files (`stamps`), and on the model.
        """
        content = sorted((name, stamps[name], _content(weight)) for name, weight in self.at(0).items() if weight != 0)
        return blake3(repr((model, content)).encode()).hexdigest(length=16)

    def restricted(self, experts: Collection[str], layers: Sequence[str]) -> ExpertWeights:
        """Return a copy that has only the given experts, and only those patterns that match one of the layers."""
        kept: dict[str, Weight | Schedule] = {}
        for name, weight in self.weights.items():
            if name not in experts:
                continue
            if isinstance(weight, Mapping):
                weight = {pattern: value for pattern, value in weight.items() if matches(pattern, layers)}  # noqa: PLW2901
            if weight != {}:
                kept[name] = weight
        return ExpertWeights(kept)


def checked_weight(weight: Weight, where: str) -> Weight:
    """Check a weight, which is a number or a mapping from layer patterns to numbers, and return its numbers as floats.

    Raises:
        DeclarationError: if a number is not finite, or its magnitude is greater than `MAX_WEIGHT`.
    """
    if isinstance(weight, Mapping):
        return {pattern: checked_number(value, f"{where}[{pattern!r}]") for pattern, value in weight.items()}
    return checked_number(weight, where)


def checked_number(value: object, where: str) -> float:
    """Check a number and return it as a float. `where` is the place that an error message names.

    Raises:
        DeclarationError: if the value is not a finite number, or its magnitude is greater than `MAX_WEIGHT`.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        what = f"the weight {value!r} is not a finite number"
    elif abs(number := float(value)) > MAX_WEIGHT:
        what = f"the weight is {number!r}, but it must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}"
    else:
        return number
    raise DeclarationError(what, where=where, mend="give a number such as 0.6")


def matches(pattern: str, layers: Sequence[str]) -> bool:
    """Return whether a pattern with file-name wildcards matches the name of at least one layer."""
    return any(fnmatchcase(layer, pattern) for layer in layers)


def _times(weight: Weight | Schedule, scale: float) -> Weight | Schedule:
    if callable(weight):
        return lambda step: _times_number(weight(step), scale)
    return _times_number(weight, scale)


def _times_number(weight: Weight, scale: float) -> Weight:
    if isinstance(weight, Mapping):
        return {pattern: value * scale for pattern, value in weight.items()}
    return weight * scale


def _content(weight: Weight) -> str:
    # The order of the patterns matters: a layer has the weight of the first pattern that matches its name.
    return repr(list(weight.items()) if isinstance(weight, Mapping) else weight)
