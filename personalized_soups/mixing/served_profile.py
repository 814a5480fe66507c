"""The served profile: the profile that a model uses while no mixture is set."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from personalized_soups.declare.expert_weights import ExpertWeights, LayerWeights, ProfileLike
from personalized_soups.errors import UsageError
from personalized_soups.mixing.active_mixture import ActiveMixture
from personalized_soups.mixing.profile_registry import Names, ProfileRegistry


class ServedProfile:
    """The profile of every row while no mixture is set. Until `set` is called, it is the bare base.

    `SoupModel.served` is a ServedProfile.

    Args:
        registry: resolves profiles into weights.
        active: writes the served weights into the gates.
    """

    def __init__(self, registry: ProfileRegistry, active: ActiveMixture) -> None:
        self._registry = registry
        self._active = active
        self._weights = ExpertWeights()
        self._is_enabled = True
        # The weights are scaled when they are written, so that a later `set_scale` applies to the served profile, too.
        active.idle_weights = lambda: registry.scaled(self.weights)

    @property
    def weights(self) -> ExpertWeights:
        """The served weights, without the experts' scales. They are empty while the bare base is served."""
        return self._weights if self._is_enabled else ExpertWeights()

    @property
    def experts(self) -> list[str]:
        """The names of the served experts."""
        return list(self.weights.weights)

    def set(self, profile: ProfileLike) -> None:
        """Serve a profile. With None, serve the bare base.

        After an error, the served profile is the same as before.

        Raises:
            DeclarationError: in the same cases as `SoupModel.mixture`.
            UsageError: in the same cases as `SoupModel.mixture`, and if a weight is a function of the token's number.
        """
        with self._active.lock:
            self._set(self._registry.resolve(profile))

    def set_adapters(self, names: Names, weights: float | LayerWeights | Sequence[float | LayerWeights] = 1.0) -> None:
        """Serve the weighted sum of experts.

        Args:
            names: the name of one expert, or a list of names.
            weights: one weight for all named experts, or one weight for each. A weight may differ by layer, as in
                `SoupModel.mixture`.

        Raises:
            UsageError: if an expert is unknown, the numbers of names and weights differ, or a weight does not fit into
                the model's dtype.
            DeclarationError: if a weight is not a finite number, or a pattern matches no layer.
        """
        with self._active.lock:
            self._set(self._registry.resolve_adapters(names, weights))

    def disable(self) -> None:
        """Serve the bare base until `enable`, `set` or `set_adapters` is called."""
        self._enable(False)

    def enable(self) -> None:
        """Serve again the profile that was served before `disable` was called."""
        self._enable(True)

    def restrict(self, experts: Collection[str], layers: Sequence[str]) -> None:
        """Keep only the served weights of `experts`, and only the patterns that match one of `layers`.

        The caller must hold the lock.
        """
        # Weights of removed experts are dropped silently, because no caller could handle an error.
        self._weights = self._weights.restricted(experts, layers)
        self._active.settle()

    def _set(self, weights: ExpertWeights) -> None:
        if weights.is_scheduled:
            raise UsageError(
                "a weight of the served profile is a function of the token's number, but nothing counts tokens between "
                "calls",
                where="weights",
                mend="give the profile together with the prompts: generate(prompts, profile)",
            )
        if weights.weights:
            self._active.new_mixture([self._registry.scaled(weights)])  # raises for a wrong weight before any change
        self._weights, self._is_enabled = weights, True
        self._active.settle()

    def _enable(self, is_enabled: bool) -> None:
        with self._active.lock:
            self._is_enabled = is_enabled
            self._active.settle()
