"""Which user and which resource a path names, as it is sent and as it is routed."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import compile_path

from personalized_soups.serving.web.routes.user_paths import UserPath, UserPaths, user_path

# The templates in the order in which the server tries them.
RESOURCES = ["/questions", "/questions/last", "/questions/finish", ""]


def _scope(raw: str, *, with_raw: bool = True) -> dict[str, Any]:
    scope = {"type": "http", "path": unquote(raw)}
    return {**scope, "raw_path": raw.encode("ascii")} if with_raw else scope


def _routed(raw: str) -> UserPath | None:
    """Return what the server's routes make of a path."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])

    asyncio.run(UserPaths(app)(_scope(raw), None, None))  # type: ignore[arg-type]
    for resource in RESOURCES:
        regex, _, convertors = compile_path(f"/v1/profiles/{{user:any}}{resource}")
        match = regex.match(seen[0])
        if match:
            return UserPath(str(convertors["user"].convert(match["user"])), resource)
    return None


@pytest.mark.parametrize(
    ("raw", "user", "resource"),
    [
        ("/v1/profiles/a", "a", ""),
        ("/v1/profiles/a/questions", "a", "/questions"),
        ("/v1/profiles/a%2Fquestions", "a/questions", ""),
        ("/v1/profiles/a%2fquestions/questions", "a/questions", "/questions"),
        ("/v1/profiles/a/b/questions/last", "a/b", "/questions/last"),
        ("/v1/profiles/a/questions%2Flast", "a/questions/last", ""),
        ("/v1/profiles/a/questions/finish", "a", "/questions/finish"),
        ("/v1/profiles/a/questions/questions/last", "a/questions", "/questions/last"),
        ("/v1/profiles/a/question%73", "a/questions", ""),
        ("/v1/profiles/a/questions%0A", "a/questions\n", ""),
        ("/v1/profiles/a/questions/", "a/questions/", ""),
        ("/v1/profiles/questions", "questions", ""),
        ("/v1/profiles/questions/last", "questions/last", ""),
        ("/v1/profiles//questions", "", "/questions"),
        ("/v1/profiles/%F0%9F%98%80/questions", "😀", "/questions"),
    ],
)
def test_a_path_names_one_user_and_one_resource(raw: str, user: str, resource: str) -> None:
    assert user_path(_scope(raw)) == _routed(raw) == (user, resource)


PARTS = ["a", "q", "/", "%", "\n", " ", "\x00", "😀", "é", "/questions", "questions", "/last", "/finish"]


@given(st.lists(st.sampled_from(PARTS), max_size=6).map("".join), st.sampled_from(RESOURCES))
def test_every_user_has_a_path_to_every_resource(user: str, resource: str) -> None:
    raw = f"/v1/profiles/{quote(user, safe='')}{resource}"
    assert user_path(_scope(raw)) == _routed(raw) == (user, resource)


def test_other_paths_name_no_user() -> None:
    assert user_path(_scope("/v1/profiles")) is None
    assert user_path(_scope("/v1/models/soup:a/questions")) is None


def test_a_server_may_leave_the_raw_path_out() -> None:
    assert user_path(_scope("/v1/profiles/a/questions", with_raw=False)) == ("a", "/questions")
