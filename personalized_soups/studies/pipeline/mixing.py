"""The weights with which a user's experts are mixed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.profile import MethodName, Profile
from personalized_soups.studies.pipeline.targets import ends_of
from personalized_soups.systems.bone_soups.mixing import backbone_weights

CHOICE = "choice.json"


@dataclass(frozen=True, slots=True)
class Mixing:
    """How the experts of a step are mixed.

    Attributes:
        catalogue: the dimensions and sides.
        beta: the `beta` of backbones, of which there is one for each dimension. None if there is an expert for each
            side.
        weight: the weight of an expert, or the factor of all backbones. None if it was chosen.
        choice: the choose step. None if the weight was declared.
        method: the merge method. None if it was chosen.
    """

    catalogue: Catalogue
    beta: float | None
    weight: float | None = None
    choice: str | None = None
    method: MethodName | None = "linear"

    def resolved(self, inputs: Mapping[str, Path]) -> tuple[MethodName, float]:
        """Return the merge method and the weight, given the folders of the needed steps."""
        if self.choice is None:
            assert self.weight is not None
            return self.method or "linear", self.weight
        choice = json.loads((inputs[self.choice] / CHOICE).read_text(encoding="utf-8"))
        method = self.method or choice["method"]
        return method, choice["weights"][method]

    def expert_folders(self, inputs: Mapping[str, Path]) -> list[Path]:
        """Return the folders of the experts among the needed steps."""
        return [folder for name, folder in inputs.items() if name != self.choice]

    def profile(self, shares: Mapping[str, float], method: MethodName, weight: float) -> Profile | None:
        """Return the profile of a user who prefers the sides with these shares, which add up to 1 in each dimension.

        Return None, which stands for the base, if all weights are 0: half of either side, with backbones.

        A backbone is trained towards the high side. So a user's preference is the share of the high side minus that of
        the low side, and the weights of backbones follow from all preferences (Bone Soups).
        """
        if self.beta is None:
            weights = {side: weight * share for side, share in shares.items() if share}
        else:
            ends = ends_of(self.catalogue)
            preference = {name: shares.get(high, 0.0) - shares.get(low, 0.0) for name, (low, high) in ends.items()}
            weights = {name: weight * each for name, each in backbone_weights(preference, self.beta).items()}
        return Profile(method=method, weights=weights, allow_opposed=True) if any(weights.values()) else None


def shares_between(
    catalogue: Catalogue, combinations: Sequence[tuple[str, ...]], num_steps: int
) -> list[dict[str, float]]:
    """Return the mixtures on all ways from one side of a dimension to another, each once.

    The sides of the other dimensions are those of each combination. Ways meet at combinations.
    """
    found: dict[frozenset[tuple[str, float]], dict[str, float]] = {}
    for at, dimension in enumerate(catalogue.dimensions.values()):
        contexts = dict.fromkeys((*sides[:at], *sides[at + 1 :]) for sides in combinations)
        for (first, last), others in itertools.product(itertools.combinations(dimension.sides, 2), contexts):
            for step in range(num_steps):
                share = step / (num_steps - 1)
                own = {first: 1 - share, last: share}
                shares = {side: each for side, each in own.items() if each} | dict.fromkeys(others, 1.0)
                found.setdefault(frozenset(shares.items()), shares)
    return list(found.values())
