"""The profiles of a model that have a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError, choose_from
from personalized_soups.mixing.profile_registry import ProfileRegistry


class NamedProfiles(Mapping[str, ExpertWeights]):
    """The weights of each named profile. A profile takes a few hundred bytes.

    `SoupModel.profiles` is such an object. Changes wait until other threads have left their mixtures; a batch keeps the
    weights that it started with.

    Args:
        registry: resolves the profiles, and finds them by name.
        lock: held during changes.
    """

    def __init__(self, registry: ProfileRegistry, lock: AbstractContextManager[Any]) -> None:
        self._registry = registry
        self._lock = lock

    def __getitem__(self, name: str) -> ExpertWeights:
        return self._registry.named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.named)

    def __len__(self) -> int:
        return len(self._registry.named)

    def add(self, profile: Profile, name: str | None = None) -> None:
        """Add a profile, or replace the profile of that name.

        Args:
            profile: the profile.
            name: its name; `profile.user` if left out.

        Raises:
            DeclarationError: for an unknown expert, opposed sides, or a weight that is not a finite number.
            UsageError: if an expert has that name, or the profile has a method other than linear or a rank.
        """
        # A dict has no user, and no record of opposed sides that are allowed.
        if not isinstance(profile, Profile):
            raise UsageError(
                f"expected a Profile, got {type(profile).__name__}",
                where="profile",
                mend="give Profile(user='u1042', weights={...})",
            )
        name = name or profile.user
        with self._lock:
            if self._registry.has_expert(name):
                raise UsageError(f"an expert is called {name!r}", where="name", mend="give the profile another name")
            # The resolved weights are kept and not the Profile, which takes four times the memory.
            self._registry.named[name] = self._registry.resolve(profile)

    def remove(self, name: str) -> None:
        """Remove a profile.

        Raises:
            UsageError: if no profile has that name.
        """
        with self._lock:
            if name not in self._registry.named:
                raise UsageError(f"no profile is called {name!r}", where="profiles", mend=choose_from(name, [*self]))
            del self._registry.named[name]
