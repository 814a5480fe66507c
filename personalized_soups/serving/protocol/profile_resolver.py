"""Whose soup a request is answered with: what its `model` and `profile` mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from personalized_soups.declare.declared import Places
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.declare.loader import load_data
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, SoupError
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.protocol.expert_files import ExpertFiles
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.users.profiles.store import ProfileStore

SOUP = "soup:"

# `soup:u1042@7` is version 7 of u1042's; a user whose name ends so is asked for with a version behind it.
_VERSIONED = re.compile(r"(?s)(?P<user>.+)@(?P<version>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class ResolvedProfile:
    """Whom a request is answered for.

    Args:
        weights: of the experts; none are the base alone.
        kind: of the profile, for metrics.
        user: the stored profile's.
        model: what the answer says that it is from.
    """

    weights: ExpertWeights
    kind: Literal["base", "inline", "stored"]
    user: str | None
    model: str


class ProfileResolver:
    """Finds out for whom a request is.

    Args:
        model: base and experts.
        base: the name under which the base is served.
        store: of profiles, where there is one.
        files: of the experts, which may have changed since they were loaded.
    """

    def __init__(self, model: SoupModel, base: str, store: ProfileStore | None, files: ExpertFiles) -> None:
        self.base = base
        self._model = model
        self._store = store
        self._files = files

    def guest(self, model: str, profile: Mapping[str, Any] | None) -> ResolvedProfile:
        """Return for whom a request is; reads the store, so not for an event loop.

        Raises:
            ApiError: 404 for an unknown model or profile, 422 for a profile that cannot be honoured, 503 where an
                expert's files have changed.
        """
        if model.startswith(SOUP):
            if profile is not None:
                raise ApiError(
                    400,
                    f"model names a stored profile, and profile gives another; name {self.base!r} as the model",
                    param="profile",
                    code="invalid_value",
                )
            return self._stored(model)
        if model != self.base:
            raise ApiError(
                404,
                f"The model {model!r} does not exist; it is {self.base!r}, or soup:USER for a stored profile",
                param="model",
                code="model_not_found",
            )
        if profile is None:
            return ResolvedProfile(ExpertWeights(), "base", None, self.base)
        return ResolvedProfile(self.weights(_declared(profile), "profile"), "inline", None, self.base)

    def weights(self, profile: Profile, param: str) -> ExpertWeights:
        """Return a profile's weights, if they can be served now.

        Raises:
            ApiError: 422 if the library can't honour the profile, 503 where an expert's files have changed.
        """
        try:
            row = self._model.resolve(profile)
        except SoupError as fault:
            raise api_error(fault, param=param, status=422) from fault
        self._files.check(row.weights)
        return row

    def _stored(self, model: str) -> ResolvedProfile:
        name = model.removeprefix(SOUP)
        if self._store is None:
            raise ApiError(
                404,
                f"The model {model!r} does not exist: this server was started without a profile store",
                param="model",
                code="profile_not_found",
            )
        versioned = _VERSIONED.fullmatch(name)
        user, version = (versioned["user"], int(versioned["version"])) if versioned else (name, None)
        try:
            stored = self._store.get(user, version)
        except SoupError as fault:  # a name that can't be kept is nobody's
            raise api_error(fault, param="model", status=404) from fault
        weights = self.weights(stored.profile.with_places(Places("profile", {})), "model")
        return ResolvedProfile(weights, "stored", user, f"{SOUP}{user}@{stored.version}")


def _declared(profile: Mapping[str, Any]) -> Profile:
    """Return what a request's profile declares.

    Raises:
        ApiError: 400, if it is none.
    """
    try:
        # most are right: what is wrong is found again, and told, the long way
        return Profile.model_validate(profile).with_places(Places("profile", {}))
    except ValidationError:
        pass
    try:
        return load_data(profile, Profile, "profile")
    except DeclarationError as fault:
        raise api_error(fault, param="profile") from fault
