"""The profile that answers while no mixture is set."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from personalized_soups.declare.expert_weights import ExpertWeights, LayerWeights, ProfileLike
from personalized_soups.errors import UsageError
from personalized_soups.mixing.active_mixture import ActiveMixture
from personalized_soups.mixing.profile_registry import Names, ProfileRegistry


class ServedProfile:
    """The profile of every row while no mixture is set: the bare base until `set` is called.

    `SoupModel.served` is such an object.

    Args:
        registry: resolves profiles.
        active: writes the weights into the gates.
    """

    def __init__(self, registry: ProfileRegistry, active: ActiveMixture) -> None:
        self._registry = registry
        self._active = active
        self._weights = ExpertWeights()
        self._is_enabled = True
        # Scaled when they are written, so that a later `set_scale` applies to the served profile, too.
        active.idle_weights = lambda: registry.scaled(self.weights)

    @property
    def weights(self) -> ExpertWeights:
        """The served weights, without the experts' scales; empty while the bare base answers."""
        return self._weights if self._is_enabled else ExpertWeights()

    @property
    def experts(self) -> list[str]:
        """The names of the served experts."""
        return list(self.weights.weights)

    def set(self, profile: ProfileLike) -> None:
        """Serve a profile; None serves the bare base.

        Raises:
            DeclarationError: as `SoupModel.mixture`. The served profile stays as it was.
            UsageError: as `SoupModel.mixture`, and if a weight is a function of the token's number. The served profile
                stays as it was.
        """
        with self._active.lock:
            self._set(self._registry.resolve(profile))

    def set_adapters(self, names: Names, weights: float | LayerWeights | Sequence[float | LayerWeights] = 1.0) -> None:
        """Serve the weighted sum of experts.

        Args:
            names: of one expert or several.
            weights: one weight for all of them, or one for each. A weight may differ by layer, as in `mixture`.

        Raises:
            UsageError: for an unknown expert, or if the numbers of names and weights differ.
            DeclarationError: if a weight is not a finite number, or a pattern matches no layer.
        """
        with self._active.lock:
            self._set(self._registry.resolve_adapters(names, weights))

    def disable(self) -> None:
        """Serve the bare base until `enable` or `set`."""
        self._enable(False)

    def enable(self) -> None:
        """Serve again the profile that was served before `disable`."""
        self._enable(True)

    def restrict(self, experts: Collection[str], layers: Sequence[str]) -> None:
        """Drop experts and layer patterns that no longer exist. The caller holds the lock."""
        # Weights of removed experts are dropped and not rejected: no caller is there to get an error.
        self._weights = self._weights.restricted(experts, layers)
        self._active.settle()

    def _set(self, weights: ExpertWeights) -> None:
        if weights.is_scheduled:
            raise UsageError(
                "a served weight cannot be a function of the token's number: nothing counts tokens between calls",
                where="weights",
                mend="give it with the prompt: generate(prompts, [profile])",
            )
        if weights.weights:
            self._active.new_mixture([self._registry.scaled(weights)])  # raises before anything has changed
        self._weights, self._is_enabled = weights, True
        self._active.settle()

    def _enable(self, is_enabled: bool) -> None:
        with self._active.lock:
            self._is_enabled = is_enabled
            self._active.settle()
