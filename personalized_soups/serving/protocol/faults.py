"""Errors in the form of OpenAI's protocol, so that its clients handle them like OpenAI's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.responses import JSONResponse

from personalized_soups.errors import FileFormatError, InputError, SoupError
from personalized_soups.serving.engine.queue import ClosedError, QueueFullError
from personalized_soups.serving.protocol.expert_files import ExpertsChangedError
from personalized_soups.users.profiles.failures import StoreFull, StoreUnavailable, UnknownProfile, VersionConflict

_log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error that a client receives.

    Args:
        status: of HTTP.
        message: what is wrong, and how to fix it.
        param: the request's parameter that caused it.
        code: the error's name for programs.
        headers: sent with the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body in the protocol's form."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def api_error(error: Exception, *, param: str | None = None, status: int = 400, retry_after: int = 1) -> ApiError:
    """Return the error that a client receives for an exception.

    Args:
        error: an exception of this package; clients learn nothing about any other exception.
        param: the request's parameter that caused it.
        status: for input that the client sent and that cannot be used.
        retry_after: seconds after which the request may succeed, for a full queue or an unavailable store.
    """
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, SoupError):
        return ApiError(500, "the server failed with an internal error; its log has the details", code="internal_error")
    if isinstance(error, StoreUnavailable | FileFormatError):
        _log.error("the profile store cannot be used: %s (%s)", error.what, error.where)
    for known in _KNOWN_ERRORS:
        if isinstance(error, known.kinds):
            headers = {"Retry-After": str(known.retry_after or retry_after)} if known.is_temporary else {}
            if isinstance(error, VersionConflict) and error.current is not None:
                headers["ETag"] = f'"{error.current}"'
            message = known.message or f"{error.what}; {error.mend}"
            return ApiError(known.status, message, param=param, code=known.code, headers=headers)
    if error.exit_code != InputError.exit_code:
        return ApiError(500, f"{error.what}; {error.mend}", code="run_failed")
    # clients see places in their request, but no paths of the server
    where = f"{error.where}: " if error.where.startswith(("profile", "weights", "user")) else ""
    return ApiError(status, f"{where}{error.what}; {error.mend}", param=param, code="invalid_value")


class _KnownError(NamedTuple):
    """How clients see some kinds of errors.

    Attributes:
        kinds: the exceptions.
        status: of HTTP.
        code: the error's name for programs.
        message: replaces the exception's own text and fix; None keeps them.
        is_temporary: whether the same request may succeed later. The response then has a Retry-After header.
        retry_after: seconds in that header; None uses the caller's.
    """

    kinds: tuple[type[SoupError], ...]
    status: int
    code: str
    message: str | None = None
    is_temporary: bool = False
    retry_after: int | None = None


# Clients never learn where the store's database is.
_KNOWN_ERRORS = (
    _KnownError((QueueFullError,), 429, "queue_full", is_temporary=True),
    _KnownError((ClosedError,), 503, "shutting_down", is_temporary=True),
    _KnownError((ExpertsChangedError,), 503, "experts_changed", is_temporary=True, retry_after=5),
    _KnownError(
        (StoreUnavailable, FileFormatError),
        503,
        "store_unavailable",
        "the profile store cannot be used now; the server's log has the details",
        is_temporary=True,
    ),
    _KnownError((StoreFull,), 507, "store_full", "the disk of the profile store is full; the profile was not written"),
    _KnownError((VersionConflict,), 412, "version_conflict"),
    _KnownError((UnknownProfile,), 404, "profile_not_found"),
)
