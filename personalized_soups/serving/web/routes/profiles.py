"""/v1/profiles: read and write stored profiles. ETags prevent lost updates."""

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

# Maximum number of threads for writes. Writes wait for each other, and other requests need threads, too.
_WRITERS = 8

IfMatch = Annotated[
    str | None, Header(alias="If-Match", description='The current version as an ETag, such as "7"; * matches any.')
]
IfNoneMatch = Annotated[
    str | None,
    Header(alias="If-None-Match", description='PUT: * writes only a new profile. GET: the known version, such as "7".'),
]
Version = Annotated[int | None, Query(ge=1, le=_MAX_VERSION)]


def router(store: ProfileStore) -> APIRouter:
    """Return the routes of this module.

    Args:
        store: the profile store. Its `check` should reject profiles that cannot be served.
    """
    routes = APIRouter(route_class=StrictRoute, tags=["profiles"])
    writers = CapacityLimiter(_WRITERS)

    @routes.get("/v1/profiles")
    def list_profiles(
        after: Annotated[str, Query(description="List the users after this name.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        search: Annotated[
            str,
            Query(
                max_length=MAX_USER_BYTES,
                description="List only names that contain this text; ASCII letters match in either case.",
            ),
        ] = "",
    ) -> JSONResponse:
        """List the users' current profiles, sorted by user name."""
        stored_profiles = store.page(after=after, limit=limit + 1, search=search)
        data = [content_of(stored) for stored in stored_profiles[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(stored_profiles) > limit})

    @routes.get("/v1/profiles/{user:any}")
    def get_profile(
        user: str,
        version: Version = None,
        history: Annotated[bool, Query(description="List all versions, the oldest first.")] = False,
        if_none_match: IfNoneMatch = None,
    ) -> Response:
        """Return a user's current profile, the given `version` of it, or its `history`."""
        check_name(user)
        if history:
            return JSONResponse({"object": "list", "data": [content_of(stored) for stored in store.history(user)]})
        stored = store.get(user, version)
        if if_none_match is not None and _is_known(if_none_match, stored.version):
            return Response(status_code=304, headers=etag_of(stored))
        return JSONResponse(content_of(stored), headers=etag_of(stored))

    @routes.put("/v1/profiles/{user:any}")
    async def put_profile(
        user: str, profile: dict[str, Any], if_match: IfMatch = None, if_none_match: IfNoneMatch = None
    ) -> JSONResponse:
        """Write the next version of a user's profile, for example `{"weights": {"friendly": 0.6}}`."""
        return await to_thread.run_sync(partial(put, user, profile, if_match, if_none_match), limiter=writers)

    def put(user: str, profile: dict[str, Any], if_match: str | None, if_none_match: str | None) -> JSONResponse:
        check_name(user)
        declared = _declared(user, profile)
        condition = expected_version(store, user, if_match, if_none_match)
        is_new = version_of(store, user) is None
        try:
            stored = store.put(declared, expected=condition)
        except SoupError as fault:
            raise api_error(fault, param="profile", status=422) from fault
        return JSONResponse(content_of(stored), status_code=201 if is_new else 200, headers=etag_of(stored))

    @routes.delete("/v1/profiles/{user:any}", status_code=204)
    async def delete_profile(user: str, if_match: IfMatch = None) -> Response:
        """Delete all versions of a user's profile."""
        await to_thread.run_sync(partial(delete, user, if_match), limiter=writers)
        return Response(status_code=204)

    def delete(user: str, if_match: str | None) -> None:
        check_name(user)
        store.delete(user, expected=expected_version(store, user, if_match, None))

    return routes


def no_store() -> APIRouter:
    """Return routes that answer with the error that the server has no profile store."""
    routes = APIRouter(tags=["profiles"])

    @routes.api_route("/v1/profiles", methods=["GET"], include_in_schema=False)
    @routes.api_route("/v1/profiles/{user:any}", methods=["GET", "PUT", "DELETE"], include_in_schema=False)
    def refuse() -> None:
        raise ApiError(404, "this server was started without a profile store", code="no_store")

    return routes


def expected_version(store: ProfileStore, user: str, if_match: str | None, if_none_match: str | None) -> int | None:
    """Return the version that a write expects according to its condition headers; None if it expects no version.

    Raises:
        ApiError: 412 if the condition of `If-Match` does not hold; 400 if `If-None-Match` is not `*` or is sent
            together with `If-Match`.
    """
    if if_none_match is not None:
        if if_none_match.strip() != "*" or if_match is not None:
            raise ApiError(
                400, "a write accepts only `If-None-Match: *`, without an `If-Match` header", param="If-None-Match"
            )
        return ABSENT
    if if_match is None:
        return None
    current = version_of(store, user)
    if current is None:
        raise ApiError(412, f"no profile of {user!r} is stored", param="If-Match", code="version_conflict")
    if if_match.strip() != "*" and str(current) not in _versions(if_match):
        raise ApiError(
            412,
            f"{user!r} is at version {current}, but If-Match names another version; get the profile again",
            param="If-Match",
            code="version_conflict",
            headers={"ETag": f'"{current}"'},
        )
    return current


def version_of(store: ProfileStore, user: str) -> int | None:
    """Return the version of a user's current profile, or None if the user has no profile."""
    try:
        return store.get(user).version
    except UnknownProfile:
        return None


def _declared(user: str, profile: Mapping[str, Any]) -> Profile:
    """Return the profile in a request's body.

    Raises:
        ApiError: 400 if the body is not a valid profile, or if it names another user than the path.
    """
    if profile.get("user", user) != user:
        raise ApiError(
            400, "the `user` in the profile differs from the user in the path", param="user", code="invalid_value"
        )
    try:
        return load_data({**profile, "user": user}, Profile, "profile")
    except SoupError as fault:
        raise api_error(fault, param="profile") from fault


def check_name(user: str) -> None:
    """Check a user's name.

    Raises:
        ApiError: 400 if it is not a valid name.
    """
    try:
        check_user(user)
    except SoupError as fault:
        raise api_error(fault, param="user") from fault


def content_of(stored: StoredProfile) -> dict[str, Any]:
    """Return the body of a response that contains a stored profile."""
    return {
        "object": "profile",
        "user": stored.profile.user,
        "version": stored.version,
        "written_at": stored.written_at.isoformat(),
        "profile": stored.profile.model_dump(exclude_defaults=True),
    }


def _is_known(if_none_match: str, version: int) -> bool:
    return if_none_match.strip() == "*" or str(version) in _versions(if_none_match, weakly=True)


def etag_of(stored: StoredProfile) -> dict[str, str]:
    """Return the ETag header of a stored profile, which is its version."""
    return {"ETag": f'"{stored.version}"'}


def _versions(header: str, *, weakly: bool = False) -> set[str]:
    """Return the versions that an If-Match or If-None-Match header lists. `weakly` accepts weak ETags (`W/`), too."""
    parts = [part.strip().removeprefix("W/") if weakly else part for part in header.split(",")]
    return {match[1] for part in parts if (match := _ETAG.fullmatch(part))}
