"""Errors in the form of OpenAI's protocol, so that every client of it tells them as it tells OpenAI's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.responses import JSONResponse

from personalized_soups.errors import FileFormatError, InputError, SoupError
from personalized_soups.serving.engine.queue import ClosedError, QueueFullError
from personalized_soups.users.profiles.failures import StoreFull, StoreUnavailable, UnknownProfile, VersionConflict

_log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do about it.
        param: the parameter of the request that is at fault.
        code: a word that programs look at.
        headers: to be sent along.
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
        """Return it as the protocol writes it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return it as a response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def api_error(fault: Exception, *, param: str | None = None, status: int = 400, retry_after: int = 1) -> ApiError:
    """Return what a client is told of a fault.

    Args:
        fault: of the package, or any other, of which nothing is told.
        param: the request's parameter that caused it.
        status: for what the client gave that cannot be honoured.
        retry_after: seconds after which to come back, where that helps.
    """
    if isinstance(fault, ApiError):
        return fault
    if not isinstance(fault, SoupError):
        return ApiError(500, "the server failed; its log says how", code="internal_error")
    if isinstance(fault, StoreUnavailable | FileFormatError):
        _log.error("the store of profiles can't be used: %s (%s)", fault.what, fault.where)
    for told in _TOLD:
        if isinstance(fault, told.kinds):
            headers = {"Retry-After": str(retry_after)} if told.is_passing else {}
            if isinstance(fault, VersionConflict) and fault.current is not None:
                headers["ETag"] = f'"{fault.current}"'
            message = told.message or f"{fault.what}; {fault.mend}"
            return ApiError(told.status, message, param=param, code=told.code, headers=headers)
    if fault.exit_code != InputError.exit_code:
        return ApiError(500, f"{fault.what}; {fault.mend}", code="run_failed")
    # places in the request help; those on this machine are nobody's business
    where = f"{fault.where}: " if fault.where.startswith(("profile", "weights", "user")) else ""
    return ApiError(status, f"{where}{fault.what}; {fault.mend}", param=param, code="invalid_value")


class _Told(NamedTuple):
    """What is told of some kinds of faults; where no message stands, what they say and the mend.

    `is_passing`: the same request may do better later.
    """

    kinds: tuple[type[SoupError], ...]
    status: int
    code: str
    message: str | None = None
    is_passing: bool = False


# Where a store's database is, is nobody's business.
_TOLD = (
    _Told((QueueFullError,), 429, "queue_full", is_passing=True),
    _Told((ClosedError,), 503, "shutting_down", is_passing=True),
    _Told(
        (StoreUnavailable, FileFormatError),
        503,
        "store_unavailable",
        "the store of profiles can't be used now; the server's log says why",
        is_passing=True,
    ),
    _Told((StoreFull,), 507, "store_full", "the disk of the store of profiles is full; nothing was written"),
    _Told((VersionConflict,), 412, "version_conflict"),
    _Told((UnknownProfile,), 404, "profile_not_found"),
)
