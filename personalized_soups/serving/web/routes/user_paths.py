"""Tells which user, and which of the user's resources, a request's path names.

A user's name may contain any character, including slashes, so `/v1/profiles/a/questions` could mean the questions of
`a` or the profile of `a/questions`. It means the questions of `a`. The profile of `a/questions` is at
`/v1/profiles/a%2Fquestions`. The raw paths differ, but routing sees only the decoded path.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

PROFILES = "/v1/profiles/"

_QUESTIONS = re.compile(r"/questions(/last|/finish)?\Z")

# Routing also accepts a newline after the end of a path, because `$` in a regular expression does.
_LIKE_QUESTIONS = re.compile(r"/questions(/last|/finish)?\n?\Z")

# No decoded path contains a lone surrogate.
_PART_OF_NAME = "\ud800"


class UserPath(NamedTuple):
    """What a path under /v1/profiles/ names.

    Attributes:
        user: the user's name.
        resource: the part of the path after the name: `/questions`, `/questions/last`, `/questions/finish`, or an empty
            string for the user's profile.
    """

    user: str
    resource: str


def user_path(scope: Scope) -> UserPath | None:
    """Return what the path of a request names, or None if the path is not under /v1/profiles/.

    Args:
        scope: the ASGI scope of the request.
    """
    path: str = scope["path"]
    if not path.startswith(PROFILES):
        return None
    rest = without_mark(path.removeprefix(PROFILES))
    resource = _QUESTIONS.search(_raw_path(scope))
    if resource is None or not rest.endswith(resource[0]):
        return UserPath(rest, "")
    return UserPath(rest.removesuffix(resource[0]), resource[0])


def without_mark(path: str) -> str:
    """Return a path, or the rest of a path, without the mark that `UserPaths` appends."""
    return path.removesuffix(_PART_OF_NAME)


class UserPaths:
    """ASGI middleware that keeps paths of profiles from being routed to questions.

    It appends a mark to such a path. `without_mark` removes the mark.

    Args:
        app: the ASGI application that routes requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application."""
        if scope["type"] == "http":
            found = user_path(scope)
            if found is not None and not found.resource and _LIKE_QUESTIONS.search(scope["path"]):
                # The web server reads the path from its own scope again, and cannot encode the mark.
                scope = {**scope, "path": scope["path"] + _PART_OF_NAME}
        await self._app(scope, receive, send)


def _raw_path(scope: Scope) -> str:
    """Return the path as it was sent, still percent-encoded. Servers may leave it out of the scope."""
    raw: bytes | None = scope.get("raw_path")
    return scope["path"] if raw is None else raw.decode("latin-1")
