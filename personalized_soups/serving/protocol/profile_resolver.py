"""Finds the soup (the weighted sum of the experts) that a request's `model` and `profile` select."""

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
from personalized_soups.serving.protocol.key_user import check_key_user
from personalized_soups.users.profiles.store import ProfileStore

SOUP = "soup:"

# `soup:u1042@7` is version 7 of user u1042. If a user's own name ends with @ and digits, a version must follow it.
_VERSIONED = re.compile(r"(?s)(?P<user>.+)@(?P<version>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class ResolvedProfile:
    """The soup that a request selects.

    Attributes:
        weights: the checked weights of the experts; empty for the base without experts.
        kind: "base" without a profile, "inline" for a profile in the request, "stored" for a stored profile.
        user: the user of the stored profile; None for the other kinds.
        model: the value of `model` in the response.
    """

    weights: ExpertWeights
    kind: Literal["base", "inline", "stored"]
    user: str | None
    model: str


class ProfileResolver:
    """Finds the soup that a request selects.

    Attributes:
        base: the model name of the base.

    Args:
        model: the base with its experts.
        base: the model name of the base.
        store: the profile store; None if the server has no store.
        files: detects experts whose files have changed since they were loaded.
    """

    def __init__(self, model: SoupModel, base: str, store: ProfileStore | None, files: ExpertFiles) -> None:
        self.base = base
        self._model = model
        self._store = store
        self._files = files

    def resolve(self, model: str, profile: Mapping[str, Any] | None, bound: str | None) -> ResolvedProfile:
        """Return the soup for a request's `model` and `profile`.

        If `model` names a stored profile, this call blocks while the store is read.

        Args:
            model: the model name in the request.
            profile: the profile in the request, or None.
            bound: the user to whom the request's API key is bound, or None (`key_user`).

        Raises:
            ApiError: 403 if `model` names the stored profile of another user than `bound`; 404 for an unknown model or
                user; 400 if `profile` is invalid, or is given although `model` names a stored profile; 422 if the
                served experts do not match the profile.
            ExpertsChangedError: if the files of an expert in the profile have changed since they were loaded.
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
            return self._stored(model, bound)
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
        """Check a profile, and return its weights.

        Args:
            profile: the profile.
            param: the request parameter that selected the profile. The error names this parameter.

        Raises:
            ApiError: 422 if the served experts do not match the profile.
            ExpertsChangedError: if the files of an expert in the profile have changed since they were loaded.
        """
        try:
            weights = self._model.resolve(profile)
        except SoupError as error:
            raise api_error(error, param=param, status=422) from error
        self._files.check(weights.weights)
        return weights

    def _stored(self, model: str, bound: str | None) -> ResolvedProfile:
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
        check_key_user(bound, user, "model")
        try:
            stored = self._store.get(user, version)
        except SoupError as error:  # 404 for an invalid user name, too: no profile has such a name
            raise api_error(error, param="model", status=404) from error
        weights = self.weights(stored.profile.with_places(Places("profile", {})), "model")
        return ResolvedProfile(weights, "stored", user, f"{SOUP}{user}@{stored.version}")


def _declared(profile: Mapping[str, Any]) -> Profile:
    """Return the profile that a request contains.

    Raises:
        ApiError: 400 if the profile is invalid.
    """
    try:
        # This is fast, but its errors are hard to read. For an invalid profile, load_data below explains the error.
        return Profile.model_validate(profile).with_places(Places("profile", {}))
    except ValidationError:
        pass
    try:
        return load_data(profile, Profile, "profile")
    except DeclarationError as error:
        raise api_error(error, param="profile") from error
