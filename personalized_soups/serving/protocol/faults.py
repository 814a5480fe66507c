"""Errors in the form of OpenAI's protocol, so that OpenAI's client libraries can handle them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.responses import JSONResponse

from personalized_soups.errors import FileFormatError, InputError, SoupError
from personalized_soups.serving.engine.queue import ClosedError, QueueFullError
from personalized_soups.serving.protocol.expert_files import ExpertsChangedError
from personalized_soups.users.profiles.failures import (
    AnsweredOtherwise,
    AnswersChanged,
    StoreFull,
    StoreUnavailable,
    UnknownProfile,
    VersionConflict,
)

_log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error that is sent to the client.

    Args:
        status: the HTTP status.
        message: what is wrong, and how to fix it.
        param: the request parameter that caused the error.
        code: an identifier of the error for programs.
        headers: additional headers of the response.
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
        """Return the JSON body of the error response."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the error response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def api_error(error: Exception, *, param: str | None = None, status: int = 400, retry_after: int = 1) -> ApiError:
    """Return the error to send to the client for an exception.

    Args:
        error: the exception. If it is not a SoupError or an ApiError, the client is told only that the server failed.
        param: the request parameter that caused the exception.
        status: the HTTP status for input that cannot be used.
        retry_after: seconds after which the request may succeed, if the cause is temporary.
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
    # `where` is sent if it is a place in the request, but not if it is a path on the server
    where = f"{error.where}: " if error.where.startswith(("profile", "weights", "user")) else ""
    return ApiError(status, f"{where}{error.what}; {error.mend}", param=param, code="invalid_value")


class _KnownError(NamedTuple):
    """The status, code and message for some classes of exceptions.

    Attributes:
        kinds: the classes.
        status: the HTTP status.
        code: an identifier of the error for programs.
        message: replaces the text of the exception; None keeps the text.
        is_temporary: whether the same request may succeed later. The response then has a Retry-After header.
        retry_after: the value of that header, in seconds; None uses the argument of `api_error`.
    """

    kinds: tuple[type[SoupError], ...]
    status: int
    code: str
    message: str | None = None
    is_temporary: bool = False
    retry_after: int | None = None


# The messages for store errors are replaced, because the originals may contain the address of the database.
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
    _KnownError((StoreFull,), 507, "store_full", "the disk of the profile store is full; nothing was written"),
    _KnownError((VersionConflict,), 412, "version_conflict"),
    _KnownError((AnswersChanged,), 409, "answers_changed"),
    _KnownError((AnsweredOtherwise,), 409, "answered_otherwise"),
    _KnownError((UnknownProfile,), 404, "profile_not_found"),
)
