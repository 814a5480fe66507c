"""The experts that a model holds, and how they change while it lives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.errors import UsageError
from personalized_soups.mixing.active_mixture import ActiveMixture
from personalized_soups.mixing.layers.experts import check_known_base
from personalized_soups.mixing.layers.mixed_layers import MixedLayers
from personalized_soups.mixing.profile_registry import ProfileRegistry
from personalized_soups.mixing.served_profile import ServedProfile

# A library of experts, its folder, or several folders.
Experts: TypeAlias = ExpertLibrary | Path | str | Sequence[Path | str]


class HeldExperts(Mapping[str, Expert]):
    """The experts of a model by name, sorted.

    `SoupModel.experts` is such an object. Changes wait until other threads have left their mixtures, so a batch sees
    one version of every expert.

    Args:
        layers: of the model.
        registry: of the model; learns the experts' names and sides.
        active: of the model.
        served: of the model; drops experts that are removed.
        base: the folder or hub id of the base; an expert that records another base's fingerprint is rejected.
        same_base: accept any name and fingerprint of a base.
    """

    def __init__(
        self,
        layers: MixedLayers,
        registry: ProfileRegistry,
        active: ActiveMixture,
        served: ServedProfile,
        *,
        base: Path | str | None,
        same_base: bool,
    ) -> None:
        self._layers = layers
        self._registry = registry
        self._active = active
        self._served = served
        self._base = base
        self._same_base = same_base

    def __getitem__(self, name: str) -> Expert:
        return self._layers.experts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers.experts)

    def __len__(self) -> int:
        return len(self._layers.experts)

    def add(self, expert: Expert | Path | str, name: str | None = None) -> str:
        """Add an expert, or replace the expert of that name. Return the name.

        Args:
            expert: an opened expert, or its folder.
            name: its name; the folder's name if left out.

        Raises:
            SoupError: if the expert is damaged, of a kind that cannot be mixed, or of another base. Nothing has changed
                then.
            UsageError: if this thread has set a mixture, a profile has that name, or the folder holds several experts.
        """
        if not isinstance(expert, Expert):
            expert = _only_expert(expert)
        if name is not None:
            expert = Expert(name, expert.folder)
        self.change([expert])
        return expert.name

    def remove(self, name: str) -> None:
        """Remove an expert and free its memory. Profiles that name it are rejected from now on.

        Raises:
            UsageError: if no expert has that name, or this thread has set a mixture.
        """
        self.change([], [name])

    def change(self, added: Sequence[Expert], removed: Sequence[str] = ()) -> None:
        """Add and remove several experts, all or nothing. An added expert replaces the expert of its name.

        Raises:
            SoupError: as `add` and `remove`. Nothing has changed then.
        """
        with self._active.lock:
            # Names first, so that a wrong name changes nothing.
            for name in removed:
                self._registry.check_expert(name)
            # The lock is this thread's, so a mixture that is set is this thread's, too: waiting would never end.
            if self._active.innermost is not None:
                raise UsageError(
                    "experts cannot change while a mixture is set",
                    where="mixture",
                    mend="leave the `with mixture(...)` block first",
                )
            # A name must mean one thing in `mixture("name")`.
            for expert in added:
                if expert.name in self._registry.named:
                    raise UsageError(
                        f"a profile is called {expert.name!r}",
                        where="name",
                        mend="give the expert another name: experts.add(..., name=...)",
                    )
            if self._base is not None and not self._same_base:
                check_known_base(added, self._base)
            try:
                # A tensor that is made in inference mode cannot be changed outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    self._layers.change(added, removed, same_base=self._same_base)
            finally:  # the experts have changed even where a warning of it was turned into an error
                self._registry.put(self._layers.experts)
                self._served.restrict(self._layers.experts, list(self._layers.by_name))

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply an expert's weight by `scale` in every profile from now on; 1 undoes it.

        Raises:
            UsageError: if no expert has that name.
            DeclarationError: if the scale is not a finite number.
        """
        with self._active.lock:
            self._registry.set_scale(name, scale)
            # A scale changes the soups of profiles whose weights stay the same.
            self._layers.cache_keys.renew([name])
            self._active.settle()


def library_of(experts: Experts) -> ExpertLibrary:
    """Return a library, or open its folder or folders."""
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
        raise UsageError(f"{folder} holds several experts", where="expert", mend="add them one by one")
    (expert,) = experts.values()
    return expert
