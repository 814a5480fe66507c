"""Which soup answers a request: the meaning of its `model` and `profile`."""

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

# `soup:u1042@7` is version 7 of user u1042. A user whose own name ends with @ and digits needs a version after it.
_VERSIONED = re.compile(r"(?s)(?P<user>.+)@(?P<version>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class ResolvedProfile:
    """The soup that answers a request.

    Attributes:
        weights: the checked weights of the experts; none for the base alone.
        kind: of the profile, for metrics.
        user: the user of a stored profile; None for other kinds.
        model: the model name in the response.
    """

    weights: ExpertWeights
    kind: Literal["base", "inline", "stored"]
    user: str | None
    model: str


class ProfileResolver:
    """Finds the soup that answers a request.

    Attributes:
        base: the model name of the base.

    Args:
        model: base and experts.
        base: the model name of the base.
        store: of profiles; None if the server has none.
        files: of the experts, which may have changed since they were loaded.
    """

    def __init__(self, model: SoupModel, base: str, store: ProfileStore | None, files: ExpertFiles) -> None:
        self.base = base
        self._model = model
        self._store = store
        self._files = files

    def resolve(self, model: str, profile: Mapping[str, Any] | None) -> ResolvedProfile:
        """Return the soup for a request's `model` and `profile`. Blocks while it reads the store.

        Raises:
            ApiError: 404 for an unknown model or user, 400 or 422 for a profile that cannot be served.
            ExpertsChangedError: if the files of one of its experts have changed.
        """
        if model.startswith(SOUP):
            if profile is not None:
                raise ApiError(
                    400,
                    "`model` names a stored profile, but `profile` gives another profile; "
                    f"to use `profile`, set `model` to {self.base!r}",
                    param="profile",
                    code="invalid_value",
                )
            return self._stored(model)
        if model != self.base:
            raise ApiError(
                404,
                f"The model {model!r} does not exist; use {self.base!r}, or soup:USER for the stored profile of USER",
                param="model",
                code="model_not_found",
            )
        if profile is None:
            return ResolvedProfile(ExpertWeights(), "base", None, self.base)
        return ResolvedProfile(self.weights(_declared(profile), "profile"), "inline", None, self.base)

    def weights(self, profile: Profile, param: str) -> ExpertWeights:
        """Return a profile's checked weights.

        Args:
            profile: the profile.
            param: the parameter of the request that gave the profile, for the error.

        Raises:
            ApiError: 422 if the served experts do not match the profile.
            ExpertsChangedError: if the files of one of its experts have changed.
        """
        try:
            weights = self._model.resolve(profile)
        except SoupError as error:
            raise api_error(error, param=param, status=422) from error
        self._files.check(weights.weights)
        return weights

    def _stored(self, model: str) -> ResolvedProfile:
        name = model.removeprefix(SOUP)
        if self._store is None:
            raise ApiError(
                404,
                f"The model {model!r} does not exist, because this server was started without a profile store",
                param="model",
                code="profile_not_found",
            )
        versioned = _VERSIONED.fullmatch(name)
        user, version = (versioned["user"], int(versioned["version"])) if versioned else (name, None)
        try:
            stored = self._store.get(user, version)
        except SoupError as error:  # an invalid user name has no profile either
            raise api_error(error, param="model", status=404) from error
        weights = self.weights(stored.profile.with_places(Places("profile", {})), "model")
        return ResolvedProfile(weights, "stored", user, f"{SOUP}{user}@{stored.version}")


def _declared(profile: Mapping[str, Any]) -> Profile:
    """Return the profile in a request.

    Raises:
        ApiError: 400 if it is not a valid profile.
    """
    try:
        # the fast way, for valid profiles; load_data finds the errors of an invalid one again and explains them
        return Profile.model_validate(profile).with_places(Places("profile", {}))
    except ValidationError:
        pass
    try:
        return load_data(profile, Profile, "profile")
    except DeclarationError as error:
        raise api_error(error, param="profile") from error
