"""The experts that a model holds. Experts can be added, removed and replaced at any time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.adapters.provenance import BaseAdapterRecord
from personalized_soups.errors import UsageError
from personalized_soups.mixing.active_mixture import ActiveMixture
from personalized_soups.mixing.layers.experts import check_known_adapter, check_known_base
from personalized_soups.mixing.layers.mixed_layers import MixedLayers
from personalized_soups.mixing.profile_registry import ProfileRegistry
from personalized_soups.mixing.served_profile import ServedProfile

# A library of experts, the folder of a library, or several folders.
Experts: TypeAlias = ExpertLibrary | Path | str | Sequence[Path | str]


class HeldExperts(Mapping[str, Expert]):
    """The experts of a model by name, sorted.

    `SoupModel.experts` is a HeldExperts. Its methods wait until other threads have left their mixtures, so no expert
    changes during a batch.

    Args:
        layers: the wrapped layers of the model.
        registry: the profile registry of the model. It gets the new experts after each change.
        active: the object that sets the model's mixtures.
        served: the served profile of the model. The weights of removed experts are dropped from it.
        base: the folder or hub id of the base. If `base` is given, an expert that records the fingerprint of another
            base is rejected.
        on: the adapter that the model's weights include, or None. An expert that records another adapter is rejected.
        same_base: accept the experts whatever base names and fingerprints they record.
    """

    def __init__(
        self,
        layers: MixedLayers,
        registry: ProfileRegistry,
        active: ActiveMixture,
        served: ServedProfile,
        *,
        base: Path | str | None,
        on: BaseAdapterRecord | None = None,
        same_base: bool,
    ) -> None:
        self._layers = layers
        self._registry = registry
        self._active = active
        self._served = served
        self._base = base
        self._on = on
        self._same_base = same_base

    def __getitem__(self, name: str) -> Expert:
        return self._layers.experts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers.experts)

    def __len__(self) -> int:
        return len(self._layers.experts)

    def add(self, expert: Expert | Path | str, name: str | None = None) -> str:
        """Add an expert and return its name. If an expert has the name already, replace that expert.

        After an error, the experts are the same as before.

        Args:
            expert: an opened expert, or its folder.
            name: the name for the expert. If left out, the name is that of the opened expert or of the folder.

        Raises:
            SoupError: if the expert is damaged, cannot be mixed, or was trained on another base.
            UsageError: if this thread has set a mixture, a profile has that name, or the folder holds several experts.
        """
        if not isinstance(expert, Expert):
            expert = _only_expert(expert)
        if name is not None:
            expert = Expert(name, expert.folder)
        self.change([expert])
        return expert.name

    def remove(self, name: str) -> None:
        """Remove an expert and free its memory. From then on, profiles that name the expert are rejected.

        Raises:
            UsageError: if no expert has that name, or this thread has set a mixture.
        """
        self.change([], [name])

    def change(self, added: Sequence[Expert], removed: Sequence[str] = ()) -> None:
        """Add and remove several experts. An added expert replaces an expert that has the same name.

        After an error, the experts are the same as before.

        Raises:
            SoupError: in the same cases as `add` and `remove`.
        """
        with self._active.lock:
            # The names are checked first, so that a wrong name changes nothing.
            for name in removed:
                self._registry.check_expert(name)
            # This thread holds the lock, so a mixture that is set is its own, and waiting for its end would never end.
            if self._active.innermost is not None:
                raise UsageError(
                    "experts cannot change while a mixture is set, but this thread has set a mixture",
                    where="mixture",
                    mend="change the experts after the `with model.mixture(...)` block",
                )
            # In `mixture("name")`, the name must not be ambiguous.
            for expert in added:
                if expert.name in self._registry.named:
                    raise UsageError(
                        f"the expert cannot be called {expert.name!r}, because a profile is called {expert.name!r}",
                        where="name",
                        mend="give the expert another name: experts.add(folder, name=...)",
                    )
            if self._base is not None and not self._same_base:
                check_known_base(added, self._base)
            check_known_adapter(added, self._on)
            try:
                # A tensor that is created in inference mode could not be changed outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    self._layers.change(added, removed, same_base=self._same_base)
            finally:  # `layers.change` may have changed the experts and then raised a warning as an error
                self._registry.put(self._layers.experts)
                self._served.restrict(self._layers.experts, list(self._layers.by_name))

    def set_scale(self, name: str, scale: float) -> None:
        """From now on, multiply an expert's weight in every profile by `scale`. A scale of 1 restores the weights.

        Raises:
            UsageError: if no expert has that name.
            DeclarationError: if the scale is not a finite number.
        """
        with self._active.lock:
            self._registry.set_scale(name, scale)
            # The scale changes soups, but not the weights of profiles, from which cache keys are made.
            self._layers.cache_keys.renew([name])
            self._active.settle()


def library_of(experts: Experts) -> ExpertLibrary:
    """Return `experts` if it is a library, else the library in the given folder or folders."""
    if isinstance(experts, ExpertLibrary):
        return experts
    return ExpertLibrary.open(*([experts] if isinstance(experts, Path | str) else experts))


def _only_expert(folder: Path | str) -> Expert:
    """Open the folder of one expert.

    Raises:
        UsageError: if the folder holds several experts.
    """
    experts = ExpertLibrary.open(folder)
    if len(experts) != 1:
        raise UsageError(
            f"the folder must hold one expert, but it holds {len(experts)} experts",
            where=str(folder),
            mend="add the experts one by one, such as experts.add('experts/friendly')",
        )
    (expert,) = experts.values()
    return expert
