"""`Guard`: checks a request's host, origin, API key and body size, and the server's load, before routing."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.web.access import KeyRing
from personalized_soups.serving.web.settings import Rules

_log = logging.getLogger(__name__)

_USUAL_HEADERS = "Authorization, Content-Type, If-Match, If-None-Match"

# A Content-Length with more digits is larger than any limit.
_MAX_DIGITS = 15

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

# The playground's pages may load files only from this server and send requests only to it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ALWAYS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_PROBED = ("/health", "/ready")


class Guard:
    """ASGI middleware that rejects requests that break a rule.

    The whole body of every other request is received before the request is passed to the application.

    Args:
        app: the ASGI application.
        rules: the rules for clients and requests.
        retry_after: returns the seconds for a Retry-After header.
        on_response: called for each response with its ASGI scope and HTTP status.
    """

    def __init__(
        self,
        app: ASGIApp,
        rules: Rules,
        *,
        retry_after: Callable[[], int],
        on_response: Callable[[Scope, int], None],
    ) -> None:
        self._app = app
        self._rules = rules
        self._keys = KeyRing(rules.keys)
        self._retry_after = retry_after
        self._on_response = on_response
        self._num_running = 0
        self._is_ending = asyncio.Event()

    def refuse_bodies(self) -> None:
        """Reject all requests whose bodies have not arrived yet, from now on."""
        self._is_ending.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application. If the request breaks a rule, send an error instead."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_response(scope, message["status"])
                sent = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    sent.setdefault(name, value)
                if self._rules.origins:
                    sent.add_vary_header("Origin")
                if origin is not None and self._is_allowed_origin(origin):
                    sent["Access-Control-Allow-Origin"] = origin
                    sent["Access-Control-Expose-Headers"] = "ETag, Retry-After"
                    sent["Cross-Origin-Resource-Policy"] = "cross-origin"
            await send(message)

        try:
            if scope["path"] not in _PROBED:  # load balancers use other host names, and these paths reveal nothing
                self._check_host(headers)
            self._check_origin(headers)
            if scope["method"] == "OPTIONS" and origin is not None:
                await _preflight(headers, scope, receive, answer)
                return
            self._keys.admit(scope, headers)
            body = await self._body(headers, receive)
            self._check_room(scope)
        except Exception as fault:
            await _refusal(fault, headers).response()(scope, receive, answer)
            return
        counts = _is_counted(scope)
        self._num_running += counts
        try:
            await self._app(scope, _replay(body, receive), answer)
        finally:
            self._num_running -= counts

    def _check_host(self, headers: Headers) -> None:
        """Reject unknown host names.

        Without this check, another site could point its own name at this machine (DNS rebinding).

        Raises:
            ApiError: 421 for an unknown host name; 400 for repeated Host or Origin headers.
        """
        if len(headers.getlist("host")) > 1 or len(headers.getlist("origin")) > 1:
            raise ApiError(400, "the request has more than one Host or Origin header", code="invalid_value")
        host = _host_of(headers.get("host", ""))
        if host in _LOOPBACK or "*" in self._rules.hosts or host in self._rules.hosts or _is_address(host):
            return
        raise ApiError(
            HTTPStatus.MISDIRECTED_REQUEST,
            f"this server does not accept the host name {host!r}; it must be started with the names that it accepts",
            code="unknown_host",
        )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or self._is_allowed_origin(origin):
            return
        if origin.partition("://")[2] == headers.get("host"):
            return
        raise ApiError(
            403,
            f"pages from {origin!r} may not use this server; start the server with this CORS origin to allow them",
            code="foreign_origin",
        )

    def _is_allowed_origin(self, origin: str) -> bool:
        return origin in self._rules.origins or "*" in self._rules.origins

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most = self._rules.max_body
        length = headers.get("content-length", "0")
        if length.isdigit() and (len(length) > _MAX_DIGITS or int(length) > most):
            raise _too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._rules.body_seconds):
                while True:
                    message = await self._received(receive)
                    if message["type"] == "http.disconnect":
                        raise ApiError(
                            400, "the client closed the connection before it sent the whole body", code="broken_off"
                        )
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the request body did not arrive within {self._rules.body_seconds:g} s", code="body_timeout"
            ) from None

    async def _received(self, receive: Receive) -> Message:
        """Wait for the next part of the body, and return it.

        Raises:
            ApiError: 503 if the server is about to shut down and the part has not arrived.
        """
        arriving = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        if arriving.done():
            return arriving.result()
        ending = asyncio.ensure_future(self._is_ending.wait())
        try:
            await asyncio.wait({arriving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if arriving.done():
                return arriving.result()
            raise ApiError(
                503,
                "the server is shutting down; send the request again later",
                code="shutting_down",
                headers={"Retry-After": "1"},
            )
        finally:
            ending.cancel()
            if not arriving.done():
                arriving.cancel()

    def _check_room(self, scope: Scope) -> None:
        if _is_counted(scope) and self._num_running >= self._rules.max_requests:
            raise ApiError(
                429,
                f"the server already handles {self._num_running} requests, which is its limit; try again later",
                code="too_many_requests",
                headers={"Retry-After": str(self._retry_after())},
            )


async def _preflight(headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
    from starlette.responses import Response

    allowed = {
        "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
        # allow all headers, because OpenAI's client for browsers sends additional ones
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", _USUAL_HEADERS),
        "Access-Control-Max-Age": "600",
    }
    await Response(status_code=204, headers=allowed)(scope, receive, send)


def _refusal(fault: Exception, headers: Headers) -> ApiError:
    """Return the error to send for an exception that a check raised."""
    if not isinstance(fault, ApiError):
        _log.error("a request could not be checked", exc_info=fault)
    refusal = api_error(fault)
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        refusal.headers["Connection"] = "close"  # the server does not wait for the rest of the body
    return refusal


def _replay(body: bytes, receive: Receive) -> Receive:
    is_given = False

    async def again() -> Any:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _is_counted(scope: Scope) -> bool:
    """Return whether a request counts toward `max_requests`. Only paths that start with /v1/ count."""
    return bool(scope["path"].startswith("/v1/"))


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"the request body has more than {most} bytes", code="body_too_large", headers={"Connection": "close"}
    )


def _host_of(header: str) -> str:
    """Return the host name in a Host header, in lower case, without port and brackets.

    The name is empty if the header is invalid.
    """
    if "@" in header or "/" in header or "?" in header or "#" in header:
        return ""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    """Return whether a host is an IP address. DNS rebinding needs a host name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
