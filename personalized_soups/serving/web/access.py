"""`KeyRing`: which API keys are accepted, and which requests a key that is bound to one user may send."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

from personalized_soups.serving.protocol.faults import ApiError
from personalized_soups.serving.protocol.key_user import bind, check_key_user, forbidden
from personalized_soups.serving.web.routes.user_paths import user_path
from personalized_soups.serving.web.settings import ApiKey

# Paths that need no key. They contain no user's data.
_OPEN = ("/health", "/ready", "/favicon.ico", "/openapi.json", "/playground")

# What a bound key may send besides requests for its own user's profile and questions. All other requests are refused,
# so a new route is refused until it is listed here. Routes that are listed must not show data of other users: the
# routes of answers and models check the user in `model`.
_FOR_BOUND_KEYS = frozenset({
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/experts"),
    ("POST", "/v1/scores"),
})  # fmt: skip
_MODEL = "/v1/models/"


class KeyRing:
    """The accepted API keys.

    Args:
        keys: the keys. If there are none, requests need no key.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = [(_digest(key.text), key.user) for key in keys]

    def admit(self, scope: Scope, headers: Headers) -> None:
        """Check a request's key, and record the user to whom the key is bound in the scope (`key_user`).

        Raises:
            ApiError: 401 if the key is missing or wrong; 403 if it is bound to a user and may not send the request.
        """
        bind(scope, None)
        path: str = scope["path"]
        if not self._keys or path == "/" or any(path == each or path.startswith(each + "/") for each in _OPEN):
            return
        user = self._user_of(headers)
        bind(scope, user)
        if user is not None:
            _check_request(scope, user)

    def _user_of(self, headers: Headers) -> str | None:
        """Return the user of the request's key, or None if the key has full access.

        Raises:
            ApiError: 401 if the key is missing or wrong.
        """
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All keys are compared, so that the response time does not reveal which key matches.
        users = [user for digest, user in self._keys if hmac.compare_digest(given, digest)]
        if scheme.lower() != "bearer" or not users:
            what = "Incorrect API key provided" if key else "You didn't provide an API key"
            raise ApiError(
                401,
                f"{what}; send a valid key in the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return users[0]


def _check_request(scope: Scope, user: str) -> None:
    """Raise ApiError 403 if a key that is bound to a user may not send a request."""
    found = user_path(scope)
    if found is not None:
        check_key_user(user, found.user, "user")
        return
    method, path = scope["method"], scope["path"]
    if (method, path) not in _FOR_BOUND_KEYS and not (method == "GET" and path.startswith(_MODEL)):
        raise forbidden()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
