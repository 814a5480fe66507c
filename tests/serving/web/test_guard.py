"""Who may ask, and how much: hosts, pages of others, keys, sizes, and what every response carries."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personalized_soups.errors import InputError, UsageError
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.guard import Guard
from personalized_soups.serving.web.key_file import read_keys
from personalized_soups.serving.web.server import listen
from personalized_soups.serving.web.settings import ApiKey, Rules, Settings
from tests.serving.servers import RunningServer, running

KEY = "a-key-of-more-than-sixteen-characters"
RULES = Rules(
    keys=[ApiKey(KEY), ApiKey("another-key-that-nobody-guesses")],
    hosts=["soups.example"],
    origins=["https://app.example"],
    max_body=2000,
    body_seconds=0.5,
)


@pytest.fixture(scope="module")
def guarded(small_base: Path, expert_folders: Path) -> Iterator[RunningServer]:
    settings = Settings("small", rules=RULES, limits=Limits(max_context=256))
    with running(small_base, expert_folders, settings) as found:
        yield found


def _bearer(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_asked_for_and_every_key_is_good(guarded: RunningServer) -> None:
    for key in RULES.keys:
        assert guarded.client(api_key=key.text).models.list().data[0].id == "small"
    for headers in ({}, _bearer("wrong"), _bearer(KEY[:-1]), _bearer(KEY + "x"), {"Authorization": f"Basic {KEY}"},
                    {"Authorization": KEY}, _bearer("\xff")):  # fmt: skip
        reply = guarded.ask("GET", "/v1/models", headers=headers)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert KEY not in reply.body.decode()
    assert guarded.ask("GET", "/v1/models", headers={"Authorization": f"bearer  {KEY} "}).status == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.client(api_key="wrong").models.list()


@pytest.mark.parametrize("path", ["/v1/experts", "/v1/experts/reload", "/v1/scores", "/v1/profiles/x", "/metrics",
                                  "/v1/chat/completions", "/playgroundx", "//v1/models"])  # fmt: skip
def test_nothing_that_tells_or_does_is_open(guarded: RunningServer, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert guarded.ask(method, path, {} if method in {"POST", "PUT"} else None).status == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/playground/", "/favicon.ico", "/openapi.json", "/"])
def test_what_is_open_needs_no_key(guarded: RunningServer, path: str) -> None:
    assert guarded.ask("GET", path).status in {200, 307}


def test_the_playground_gives_nothing_but_its_own_files(guarded: RunningServer) -> None:
    for path in ("../app.py", "%2e%2e/app.py", "..%2fapp.py", "/etc/passwd", "%00", "nothing.js"):
        assert guarded.ask("GET", f"/playground/{path}").status in {401, 404}


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "soups.example", "Soups.Example:443"],
)
def test_known_names_and_addresses_are_served(guarded: RunningServer, host: str) -> None:
    assert guarded.ask("GET", "/v1/models", headers=_bearer(), host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "soups.example.evil", "notsoups.example", "evil.example:8000", "[::1"],
)
def test_other_names_are_refused(guarded: RunningServer, host: str) -> None:
    reply = guarded.ask("GET", "/v1/models", headers=_bearer(), host=host)
    assert (reply.status, reply.error["code"]) == (421, "unknown_host")
    assert guarded.ask("GET", "/health", host=host).status == 200  # a load balancer's own name for the server


def test_pages_of_others_are_refused_unless_they_are_invited(guarded: RunningServer) -> None:
    assert guarded.ask("GET", "/health", headers={"Origin": "https://evil.example"}).status == 403
    assert guarded.ask("GET", "/health", headers={"Origin": "null"}).status == 403
    for other in ("http://127.0.0.1:1", "http://127.0.0.1", f"http://127.0.0.1:{guarded.port}.evil.example"):
        assert guarded.ask("GET", "/health", headers={"Origin": other}).status == 403
    own = guarded.ask("GET", "/health", headers={"Origin": f"http://127.0.0.1:{guarded.port}"})
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers
    invited = guarded.ask("GET", "/v1/models", headers={"Origin": "https://app.example", **_bearer()})
    assert invited.headers["access-control-allow-origin"] == "https://app.example"
    assert "Origin" in invited.headers["vary"]
    assert invited.headers["access-control-expose-headers"] == "ETag, Retry-After"  # what clients of ours read
    assert invited.headers["cross-origin-resource-policy"] == "cross-origin"
    before = guarded.ask("OPTIONS", "/v1/models", headers={"Origin": "https://app.example"})
    assert before.status == 204
    assert before.headers["access-control-allow-methods"] == "GET, POST, PUT, DELETE"
    for name in ("Authorization", "Content-Type", "If-Match", "If-None-Match"):
        assert name in before.headers["access-control-allow-headers"].split(", ")
    assert guarded.ask("OPTIONS", "/v1/models", headers={"Origin": "https://evil.example"}).status == 403


@pytest.mark.parametrize("path", ["/health", "/playground/", "/nothing", "/v1/models"])
def test_every_response_keeps_pages_to_themselves(guarded: RunningServer, path: str) -> None:
    headers = guarded.ask("GET", path).headers
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert headers["content-security-policy"].endswith("form-action 'none'; frame-ancestors 'none'")
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_a_body_that_is_too_large_is_refused_told_or_not(guarded: RunningServer) -> None:
    large = b'{"model": "' + b"x" * 2000 + b'"}'
    reply = guarded.ask("POST", "/v1/chat/completions", large, _bearer())
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=250) as sent:
        sent.sendall(f"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode())
        sent.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n")
        sent.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert b" 413 " in sent.recv(1000).split(b"\r\n")[0]


def test_a_body_that_does_not_come_is_not_waited_for(guarded: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=250) as sent:
        head = (
            f"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n"
        )
        sent.sendall(head.encode() + b"x")
        assert b" 408 " in sent.recv(1000).split(b"\r\n")[0]


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def _guard(app: ASGIApp = _echo, on_response: Callable[[Scope, int], None] = lambda *_: None, **rules: Any) -> Guard:
    return Guard(app, Rules(**rules), retry_after=lambda: 7, on_response=on_response)


class _Got:
    """What came of a request, and how many parts of its body were taken."""

    def __init__(self, sent: Sequence[Message], num_taken: int) -> None:
        self.status = sent[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        self.body = b"".join(each["body"] for each in sent[1:])
        self.num_taken = num_taken


async def _through(
    guard: Guard, *parts: bytes | None, path: str = "/v1/x", method: str = "POST", **given_headers: str
) -> _Got:
    """Let one request through, its body in parts; None is a client that hangs up."""
    left: list[Message] = [
        {"type": "http.disconnect"}
        if part is None
        else {"type": "http.request", "body": part, "more_body": place + 1 < len(parts)}
        for place, part in enumerate(parts)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return left.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    headers = {"host": "localhost", **{name.replace("_", "-"): value for name, value in given_headers.items()}}
    scope = {"type": "http", "method": method, "path": path,
             "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}  # fmt: skip
    await guard(scope, receive, send)
    return _Got(sent, len(parts) - len(left))


def test_a_body_may_have_as_many_bytes_as_it_may_and_not_one_more() -> None:
    async def test() -> None:
        guard = _guard(max_body=20)
        good: list[list[bytes]] = [[b"x" * 20], [b"x" * 15, b"y" * 5], [b"x"] * 20, [b""]]
        for parts in good:
            whole = b"".join(parts)
            for got in (
                await _through(guard, *parts),
                await _through(guard, *parts, content_length=str(len(whole))),
            ):
                assert (got.status, got.body) == (200, whole)
        bad: list[list[bytes]] = [[b"x" * 21], [b"x" * 15, b"y" * 6], [b"x"] * 21]
        for parts in bad:
            assert (await _through(guard, *parts)).status == 413
        response = await _through(guard, b"x" * 21, content_length="21")
        assert (response.status, response.num_taken) == (413, 0)  # not read at all
        assert response.headers["connection"] == "close"

    asyncio.run(test())


def test_nothing_is_read_of_those_who_may_not_ask() -> None:
    async def test() -> None:
        seen: list[int] = []
        guard = _guard(keys=[ApiKey(KEY)], on_response=lambda _, status: seen.append(status))
        assert (await _through(guard, b"x")).num_taken == 0
        assert (await _through(guard, b"x", host="evil.example")).num_taken == 0
        assert (await _through(guard, b"x", origin="http://evil.example")).num_taken == 0
        assert (await _through(guard, b"x", method="OPTIONS")).status == 401  # no page asks before it asks
        assert (await _through(guard, b"x", authorization=f"Bearer {KEY}")).body == b"x"
        assert seen == [401, 421, 403, 401, 200]

    asyncio.run(test())


def test_half_a_body_is_given_to_nobody() -> None:
    got = asyncio.run(_through(_guard(), b"x", None))
    assert (got.status, b"broken_off" in got.body) == (400, True)


def test_requests_that_fail_make_room_again() -> None:
    async def test() -> None:
        is_held, is_free, fails = asyncio.Event(), asyncio.Event(), [True]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/v1/long":
                is_held.set()
                await is_free.wait()
            elif fails.pop():
                raise ZeroDivisionError
            await _echo(scope, receive, send)

        guard = _guard(app, max_requests=1)
        with pytest.raises(ZeroDivisionError):
            await _through(guard, b"")
        fails += [False, False]
        assert (await _through(guard, b"")).status == 200
        long = asyncio.create_task(_through(guard, b"", path="/v1/long"))
        await is_held.wait()
        refused = await _through(guard, b"")
        assert (refused.status, refused.headers["retry-after"]) == (429, "7")
        is_free.set()
        assert (await long).status == 200
        assert (await _through(guard, b"")).status == 200

    asyncio.run(test())


def test_a_page_that_is_asked_for_without_its_slash_is_found_behind_a_proxy_too(guarded: RunningServer) -> None:
    for path in ("/", "/playground"):
        assert guarded.ask("GET", path).headers["location"] == "playground/"
    icon = guarded.ask("GET", "/favicon.ico")
    assert (icon.headers["content-type"], icon.body[:4]) == ("image/svg+xml", b"<svg")


def test_only_loopback_is_listened_on_without_a_key() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com"):
        with pytest.raises(UsageError, match="would accept requests without a key"):
            listen(host, 0, has_key=False)
    for host in ("127.0.0.1", "localhost"):
        listen(host, 0, has_key=False).close()
    listen("0.0.0.0", 0, has_key=True).close()


def test_a_port_that_is_taken_is_told_or_another_one_found() -> None:
    with listen("127.0.0.1", 0, has_key=False) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port, has_key=False)
        with listen("127.0.0.1", port, has_key=False, or_any=True) as other:
            assert other.getsockname()[1] != port


def test_keys_are_read_from_a_file_that_is_private(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# for the app\n{KEY}\n\n  another-key-of-some-length  \n")
    path.chmod(0o600)
    assert read_keys(path) == [ApiKey(KEY), ApiKey("another-key-of-some-length")]
    for others in (0o040, 0o004, 0o020, 0o002):
        path.chmod(0o600 | others)
        with pytest.raises(InputError, match="other users of this machine can read or change the API keys"):
            read_keys(path)
    path.chmod(0o600)
    path.write_text("x" * 16)
    assert read_keys(path) == [ApiKey("x" * 16)]
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "nothing")
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(path)


def test_a_key_may_be_bound_to_a_user_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    names = ["ada", "Ada King, Countess  of Lovelace", "user=x", "a#b", "été\u2028😀", "soup:ada@7", "a/questions"]
    keys = [f"key-number-{number}-of-some-length" for number in range(len(names))]
    lines = [f"{key} user={name}" for key, name in zip(keys, names, strict=True)]
    path.write_text("\r\n".join([*lines, KEY]), encoding="utf-8", newline="")
    path.chmod(0o600)
    assert read_keys(path) == [*map(ApiKey, keys, names), ApiKey(KEY)]
    path.write_text(f"{KEY}\tuser=ada\n")
    assert read_keys(path) == [ApiKey(KEY, "ada")]
    assert KEY not in repr(read_keys(path))


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("# none\n", "contains no API key", ""),
        ("x" * 15, "fewer than 16 characters", ":1"),
        (f"{KEY}\nshort-secret\n", "fewer than 16 characters", ":2"),
        (f"\n{KEY} for the app", "followed by something else than `user=NAME`", ":2"),
        (f"{KEY} user=", "the user's name is empty", ":1"),
        (f"{KEY} user= ada", "starts or ends with white space", ":1"),
        (f"{KEY} user=ada ", "starts or ends with white space", ":1"),
        (f"{KEY} user={'x' * 257}", "takes 257 bytes", ":1"),
        (f"{KEY}é user=ada", "not ASCII", ":1"),
        (f"{KEY}\n{KEY} user=ada", "in the file twice", ":2"),
    ],
)
def test_an_invalid_line_of_the_key_file_is_told_without_the_key(
    tmp_path: Path, text: str, what: str, where: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(InputError) as error:
        read_keys(path)
    assert what in error.value.what
    assert error.value.where == f"{path}{where}"
    assert KEY not in str(error.value)
    assert "secret" not in f"{error.value.what} {error.value.mend}".replace("secrets", "")


def test_any_host_and_origin_where_that_is_asked_for(small_base: Path, expert_folders: Path) -> None:
    rules = replace(RULES, keys=[], hosts=["*"], origins=["*"])
    with running(small_base, expert_folders, Settings("small", rules=rules, limits=Limits(max_context=256))) as served:
        reply = served.ask("GET", "/health", headers={"Origin": "https://anybody.example"}, host="anything.example")
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == "https://anybody.example"
