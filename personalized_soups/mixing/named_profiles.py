"""The named profiles of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError, choose_from
from personalized_soups.mixing.profile_registry import ProfileRegistry


class NamedProfiles(Mapping[str, ExpertWeights]):
    """The weights of each named profile, by name. A profile takes a few hundred bytes.

    `SoupModel.profiles` is a NamedProfiles. `add` and `remove` wait until other threads have left their mixtures. A
    batch keeps the weights with which it started.

    Args:
        registry: resolves profiles into weights, and stores the named profiles.
        lock: held while a profile is added or removed.
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
        """Add a profile. If a profile has the name already, replace it.

        Args:
            profile: the profile.
            name: the profile's name. If left out, the name is `profile.user`.

        Raises:
            DeclarationError: if an expert is unknown, sides are opposed, or a weight is not a finite number.
            UsageError: if `profile` is not a Profile or has a rank or a method other than linear, or if an expert has
                that name.
        """
        # A dict has neither `user` nor `allow_opposed`.
        if not isinstance(profile, Profile):
            raise UsageError(
                f"the profile must be a Profile, but it is of type {type(profile).__name__}",
                where="profile",
                mend="give a Profile, such as Profile(user='u1042', weights={'friendly': 0.6})",
            )
        name = name or profile.user
        with self._lock:
            if self._registry.has_expert(name):
                raise UsageError(
                    f"the profile cannot be called {name!r}, because an expert is called {name!r}",
                    where="name",
                    mend="give the profile another name: profiles.add(profile, name=...)",
                )
            # Only the resolved weights are kept, because a Profile takes four times as much memory.
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
