"""What stands before every request: the right host, no foreign page, a key, a body of a decent size, not too many."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.web.settings import Rules

_log = logging.getLogger(__name__)

_USUAL_HEADERS = "Authorization, Content-Type, If-Match, If-None-Match"

# Of a Content-Length that can be meant.
_MAX_DIGITS = 15

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

# What a page of ours may do: be itself, and speak to this server.
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

# Told to everybody: whether the server lives, and a page that knows nothing by itself.
_OPEN = ("/health", "/ready", "/favicon.ico", "/openapi.json", "/playground")


class Guard:
    """ASGI middleware that lets through what keeps the rules, its body read already.

    Args:
        app: what is guarded.
        rules: to be kept.
        retry_after: says after how many seconds to come back.
        on_response: is told path and status of each response.
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
        self._digests = [hashlib.sha256(key.encode()).digest() for key in rules.keys]
        self._retry_after = retry_after
        self._on_response = on_response
        self._num_running = 0
        self._is_ending = asyncio.Event()

    def refuse_bodies(self) -> None:
        """Refuse, from now on, requests whose bodies have not come."""
        self._is_ending.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_response(scope, message["status"])
                told = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    told.setdefault(name, value)
                if self._rules.origins:
                    told.add_vary_header("Origin")
                if origin is not None and self._is_invited(origin):
                    told["Access-Control-Allow-Origin"] = origin
                    told["Access-Control-Expose-Headers"] = "ETag, Retry-After"
                    told["Cross-Origin-Resource-Policy"] = "cross-origin"
            await send(message)

        try:
            if scope["path"] not in _PROBED:  # balancers ask by names of their own, and learn nothing
                self._check_host(headers)
            self._check_origin(headers)
            if scope["method"] == "OPTIONS" and origin is not None:
                await _preflight(headers, scope, receive, answer)
                return
            self._check_key(scope["path"], headers)
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
        """Refuse names that are not ours: a foreign page's name that was pointed at this machine (DNS rebinding)."""
        if len(headers.getlist("host")) > 1 or len(headers.getlist("origin")) > 1:
            raise ApiError(400, "there is more than one Host or Origin", code="invalid_value")
        host = _host_of(headers.get("host", ""))
        if host in _LOOPBACK or "*" in self._rules.hosts or host in self._rules.hosts or _is_address(host):
            return
        raise ApiError(
            HTTPStatus.MISDIRECTED_REQUEST,
            f"this server does not answer for the host {host!r}: it was not started with this name",
            code="unknown_host",
        )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or self._is_invited(origin):
            return
        if origin.partition("://")[2] == headers.get("host"):
            return
        raise ApiError(
            403,
            f"pages of {origin!r} may not ask this server: it was not started with this CORS origin",
            code="foreign_origin",
        )

    def _is_invited(self, origin: str) -> bool:
        return origin in self._rules.origins or "*" in self._rules.origins

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._digests or path == "/" or any(path == each or path.startswith(each + "/") for each in _OPEN):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # every one is compared, so that the time tells nothing
        found = [hmac.compare_digest(given, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            what = "Incorrect API key provided" if key else "You didn't provide an API key"
            raise ApiError(
                401,
                f"{what}; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most = self._rules.max_body
        told = headers.get("content-length", "0")
        if told.isdigit() and (len(told) > _MAX_DIGITS or int(told) > most):
            raise _too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._rules.body_seconds):
                while True:
                    message = await self._received(receive)
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the request was broken off", code="broken_off")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._rules.body_seconds:g} s", code="body_timeout"
            ) from None

    async def _received(self, receive: Receive) -> Message:
        """Return the next part of a body.

        Raises:
            ApiError: 503, if the server is about to end and it is not there.
        """
        coming = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        if coming.done():
            return coming.result()
        ending = asyncio.ensure_future(self._is_ending.wait())
        try:
            await asyncio.wait({coming, ending}, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
            raise ApiError(
                503, "the server is about to end; ask again", code="shutting_down", headers={"Retry-After": "1"}
            )
        finally:
            ending.cancel()
            if not coming.done():
                coming.cancel()

    def _check_room(self, scope: Scope) -> None:
        if _is_counted(scope) and self._num_running >= self._rules.max_requests:
            raise ApiError(
                429,
                f"{self._num_running} requests are being answered, as many as may at once; come back later",
                code="too_many_requests",
                headers={"Retry-After": str(self._retry_after())},
            )


async def _preflight(headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
    from starlette.responses import Response

    allowed = {
        "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
        # the openai client for browsers sends headers of its own
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", _USUAL_HEADERS),
        "Access-Control-Max-Age": "600",
    }
    await Response(status_code=204, headers=allowed)(scope, receive, send)


def _refusal(fault: Exception, headers: Headers) -> ApiError:
    """Return what is told of a request that is not let through."""
    if not isinstance(fault, ApiError):
        _log.error("a request could not be looked at", exc_info=fault)
    refusal = api_error(fault)
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        refusal.headers["Connection"] = "close"  # the rest of its body is not waited for
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
    """Whether a request is one of those that there may be too many of: whether the server lives can always be asked."""
    return bool(scope["path"].startswith("/v1/"))


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes", code="body_too_large", headers={"Connection": "close"})


def _host_of(header: str) -> str:
    """Return the name in a Host header, without port and brackets, in lower case; none where it is no name."""
    if "@" in header or "/" in header or "?" in header or "#" in header:
        return ""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    """Whether it is an address: those can't be pointed elsewhere."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
