"""/v1/profiles: the stored profiles, with ETags, so that nobody overwrites what somebody else has written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Header, Query, Response
from starlette.responses import JSONResponse

from personalized_soups.declare.loader import load_data
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import SoupError
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.protocol.strict_json import StrictRoute
from personalized_soups.users.profiles.store import (
    ABSENT,
    MAX_USER_BYTES,
    ProfileStore,
    StoredProfile,
    UnknownProfile,
    check_user,
)

_ETAG = re.compile(r'\s*"([0-9]{1,9})"\s*')
_MAX_VERSION = 2**31 - 1

# Writers wait for each other: readers, and whoever asks whether the server is ready, do not wait behind them.
_WRITERS = 8

IfMatch = Annotated[str | None, Header(alias="If-Match", description='A version as an ETag: "7"; * is any.')]
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match", description='* writes new ones only; GET: "7".')]
Version = Annotated[int | None, Query(ge=1, le=_MAX_VERSION)]


def router(store: ProfileStore) -> APIRouter:
    """Return the routes.

    Args:
        store: whose `check` refuses what cannot be served.
    """
    routes = APIRouter(route_class=StrictRoute, tags=["profiles"])
    writers = CapacityLimiter(_WRITERS)

    @routes.get("/v1/profiles")
    def list_profiles(
        after: Annotated[str, Query(description="Those that come next after this name.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        search: Annotated[
            str, Query(max_length=MAX_USER_BYTES, description='Only names that contain this text; "a" and "A" are one.')
        ] = "",
    ) -> JSONResponse:
        """List current profiles by user."""
        found = store.page(after=after, limit=limit + 1, search=search)
        data = [_told(stored) for stored in found[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(found) > limit})

    @routes.get("/v1/profiles/{user:any}")
    def get_profile(
        user: str,
        version: Version = None,
        history: Annotated[bool, Query(description="List all versions, the oldest first.")] = False,
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """Return a user's current profile, or an older version."""
        _check(user)
        if history:
            return JSONResponse({"object": "list", "data": [_told(stored) for stored in store.history(user)]})
        stored = store.get(user, version)
        if if_none_match is not None and _is_known(if_none_match, stored.version):
            return Response(status_code=304, headers=_etag(stored))
        return JSONResponse(_told(stored), headers=_etag(stored))

    @routes.put("/v1/profiles/{user:any}")
    async def put_profile(
        user: str, profile: dict[str, Any], if_match: IfMatch = None, if_none_match: IfNoneMatch = None
    ) -> JSONResponse:
        """Write a user's next version: `{"weights": {...}}`."""
        return await to_thread.run_sync(partial(put, user, profile, if_match, if_none_match), limiter=writers)

    def put(user: str, profile: dict[str, Any], if_match: str | None, if_none_match: str | None) -> JSONResponse:
        _check(user)
        declared = _declared(user, profile)
        condition = _expected(store, user, if_match, if_none_match)
        is_new = _version_of(store, user) is None
        try:
            stored = store.put(declared, expected=condition)
        except SoupError as fault:
            raise api_error(fault, param="profile", status=422) from fault
        return JSONResponse(_told(stored), status_code=201 if is_new else 200, headers=_etag(stored))

    @routes.delete("/v1/profiles/{user:any}", status_code=204)
    async def delete_profile(user: str, if_match: IfMatch = None) -> Response:
        """Erase a user with all versions."""
        await to_thread.run_sync(partial(delete, user, if_match), limiter=writers)
        return Response(status_code=204)

    def delete(user: str, if_match: str | None) -> None:
        _check(user)
        store.delete(user, expected=_expected(store, user, if_match, None))

    return routes


def no_store() -> APIRouter:
    """Return routes that say that there is no store."""
    routes = APIRouter(tags=["profiles"])

    @routes.api_route("/v1/profiles", methods=["GET"], include_in_schema=False)
    @routes.api_route("/v1/profiles/{user:any}", methods=["GET", "PUT", "DELETE"], include_in_schema=False)
    def refuse() -> None:
        raise ApiError(404, "this server was started without a profile store", code="no_store")

    return routes


def _expected(store: ProfileStore, user: str, if_match: str | None, if_none_match: str | None) -> int | None:
    """Return the version at which a user must be; None is any.

    Raises:
        ApiError: 412 if that can't be, 400 if the condition is none.
    """
    if if_none_match is not None:
        if if_none_match.strip() != "*" or if_match is not None:
            raise ApiError(400, "the condition is none; write If-None-Match: * alone", param="If-None-Match")
        return ABSENT
    if if_match is None:
        return None
    current = _version_of(store, user)
    if current is None:
        raise ApiError(412, f"there is no profile of {user!r}", param="If-Match", code="version_conflict")
    if if_match.strip() != "*" and str(current) not in _versions(if_match):
        raise ApiError(
            412,
            f"{user!r} is at version {current}; read the profile again",
            param="If-Match",
            code="version_conflict",
            headers={"ETag": f'"{current}"'},
        )
    return current


def _version_of(store: ProfileStore, user: str) -> int | None:
    """Return a user's current version; None where there is no such user."""
    try:
        return store.get(user).version
    except UnknownProfile:
        return None


def _declared(user: str, profile: Mapping[str, Any]) -> Profile:
    """Return what a body declares.

    Raises:
        ApiError: 400 if it is no profile, or another user's.
    """
    if profile.get("user", user) != user:
        raise ApiError(400, "the profile names another user than the address", param="user", code="invalid_value")
    try:
        return load_data({**profile, "user": user}, Profile, "profile")
    except SoupError as fault:
        raise api_error(fault, param="profile") from fault


def _check(user: str) -> None:
    try:
        check_user(user)
    except SoupError as fault:
        raise api_error(fault, param="user") from fault


def _told(stored: StoredProfile) -> dict[str, Any]:
    return {
        "object": "profile",
        "user": stored.profile.user,
        "version": stored.version,
        "written_at": stored.written_at.isoformat(),
        "profile": stored.profile.model_dump(exclude_defaults=True),
    }


def _is_known(if_none_match: str, version: int) -> bool:
    return if_none_match.strip() == "*" or str(version) in _versions(if_none_match, weakly=True)


def _etag(stored: StoredProfile) -> dict[str, str]:
    return {"ETag": f'"{stored.version}"'}


def _versions(header: str, *, weakly: bool = False) -> set[str]:
    """Return the versions that a condition names."""
    parts = [part.strip().removeprefix("W/") if weakly else part for part in header.split(",")]
    return {found[1] for part in parts if (found := _ETAG.fullmatch(part))}
