"""Requests to an endpoint that answers, fails on purpose, or is not there."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from personalized_soups.errors import FileFormatError, InputError, RunError, UsageError
from personalized_soups.scoring.judging.chat_client import ChatClient
from personalized_soups.scoring.judging.reply_cache import Reply, ReplyCache, request_key
from tests.scoring.judging.endpoints import Response, completion, endpoint, error


def request(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "judge", "messages": [{"role": "user", "content": text}], **more}


def text_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


def echo(body: dict[str, Any], before: int) -> Response:
    return completion(text_of(body).upper())


class Connect(Protocol):
    def __call__(self, url: str, cache: ReplyCache | None = None, **options: Any) -> ChatClient: ...


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Return a function that makes clients, which are closed at the end of the test."""
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with ExitStack() as stack:

        def connect(url: str, cache: ReplyCache | None = None, **options: Any) -> ChatClient:
            monkeypatch.setenv("OPENAI_BASE_URL", url)
            return stack.enter_context(ChatClient(cache, **{"first_wait": 0.0, "concurrency": 3, **options}))

        yield connect


def test_each_request_has_its_reply_and_is_counted(client: Connect) -> None:
    with endpoint(echo) as server:
        asked = client(server.url)
        replies = asked.replies([request(text) for text in "abcde"])
    assert [reply.text for reply in replies] == list("ABCDE")
    assert replies[0] == Reply("A", "judge-2026-11-01", "fp_1", is_cut=False, input_tokens=7, output_tokens=3)
    traffic = asked.traffic
    assert (traffic.num_asked, traffic.num_cached, traffic.num_retries) == (5, 0, 0)
    assert (traffic.input_tokens, traffic.output_tokens) == (35, 15)
    assert (traffic.models, traffic.fingerprints) == ({"judge-2026-11-01"}, {"fp_1"})
    assert set(server.keys) == {"Bearer a-key"}


def test_equal_requests_are_sent_once_and_a_rerun_sends_nothing(tmp_path: Path, client: Connect) -> None:
    with endpoint(echo) as server, ReplyCache(tmp_path / "deep" / "replies.sqlite") as cache:
        first = client(server.url, cache).replies([request(text) for text in "abab"])
        rerun = client(server.url, cache)
        again = rerun.replies([request(text) for text in "abc"])
        other = client(server.url, cache)
        other.replies([request("a", temperature=0.5)])
    assert [reply.text for reply in first] == list("ABAB")
    assert [reply.text for reply in again] == list("ABC")
    assert (rerun.traffic.num_asked, rerun.traffic.num_cached) == (1, 2)
    assert (rerun.traffic.cached_input_tokens, rerun.traffic.input_tokens) == (14, 7)
    assert other.traffic.num_asked == 1  # another parameter is another request
    assert sorted(map(text_of, server.requests)) == ["a", "a", "b", "c"]


FAILURES = {
    "rate limit": error(429, "too many", retry_after="0"),
    "conflict": error(409, "locked"),
    "server error": error(500, "out of order"),
    "overloaded": error(529, "overloaded"),
    "a page": Response("<html>Bad gateway</html>", headers={"content-type": "text/html"}),
    "no JSON": Response("{not json"),
    "other JSON": Response('{"ok": true}'),
    "a list": Response("[]"),
    "no choices": Response('{"choices": []}'),
    "a content that is no text": Response('{"choices": [{"finish_reason": "stop", "message": {"content": [1]}}]}'),
    "a body that ends early": Response(completion("A").body, missing=50),
    "an empty body": Response(""),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_failed_requests_are_sent_again(failure: Response, client: Connect) -> None:
    failed = set[str]()

    def fails_once(body: dict[str, Any], before: int) -> Response:
        if text_of(body) in failed:
            return echo(body, before)
        failed.add(text_of(body))
        return failure

    with endpoint(fails_once) as server:
        asked = client(server.url)
        replies = asked.replies([request(text) for text in "abc"])
    assert [reply.text for reply in replies] == list("ABC")
    assert asked.traffic.num_retries == 3
    assert asked.traffic.num_asked == 3


def test_a_request_without_a_reply_in_time_is_sent_again(client: Connect) -> None:
    end = threading.Event()

    def slow_once(body: dict[str, Any], before: int) -> Response:
        if before == 0:
            end.wait()
        return echo(body, before)

    with endpoint(slow_once) as server:
        asked = client(server.url, timeout=1.0)
        replies = asked.replies([request("a")])
        end.set()
    assert [reply.text for reply in replies] == ["A"]
    assert asked.traffic.num_retries >= 1


def test_replies_before_a_failure_are_kept(tmp_path: Path, client: Connect) -> None:
    def fails_for_c(body: dict[str, Any], before: int) -> Response:
        return error(503, "c is too much") if text_of(body) == "c" else echo(body, before)

    texts = [request(text) for text in "abcd"]
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        with (
            endpoint(fails_for_c) as server,
            pytest.raises(RunError, match=r"no reply in 3 tries.*c is too much") as caught,
        ):
            client(server.url, cache, concurrency=1, max_retries=2).replies(texts)
        assert caught.value.where == server.url + "/"
        assert "not asked for again" in caught.value.mend
        sent = [text_of(body) for body in server.requests]
        assert sent[:5] == ["a", "b", "c", "c", "c"]
        assert cache.get(request_key(server.url + "/", texts[0])) is not None
        assert cache.get(request_key(server.url + "/", texts[1])) is not None


def test_an_endpoint_that_is_down(client: Connect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port, and connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(RunError, match=r"in 2 tries: .*[Cc]onnection.*refused"):
            client(url, max_retries=1).replies([request("a")])


@pytest.mark.parametrize(
    ("status", "kind", "mend"),
    [(401, UsageError, "OPENAI_API_KEY"), (404, UsageError, "'judge'"), (400, InputError, "token_limit")],
)
def test_a_rejected_request_is_not_sent_again(status: int, kind: type[Exception], mend: str, client: Connect) -> None:
    with endpoint(lambda body, before: error(status, "no, thanks")) as server:
        with pytest.raises(kind, match=f"status {status}: .*no, thanks") as caught:
            client(server.url, concurrency=1).replies([request("a")])
        assert mend in caught.value.mend  # type: ignore[attr-defined]
    assert len(server.requests) == 1


def test_no_more_requests_run_at_once_than_allowed(client: Connect) -> None:
    together = threading.Barrier(3)
    lock, running, most = threading.Lock(), 0, 0

    def waits_for_others(body: dict[str, Any], before: int) -> Response:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait()  # never passes if fewer than three requests run at once
        with lock:
            running -= 1
        return echo(body, before)

    with endpoint(waits_for_others) as server:
        client(server.url, concurrency=3).replies([request(text) for text in "abcdefghi"])
    assert most == 3


def test_a_local_server_needs_no_key(client: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with endpoint(echo) as server:
        assert client(server.url).replies([request("a")])[0].text == "A"
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(UsageError, match="neither OPENAI_API_KEY nor OPENAI_BASE_URL"):
        ChatClient()


def test_the_cache_rejects_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but long enough to look at: " * 30)
    with pytest.raises(FileFormatError, match="not a cache of replies"):
        ReplyCache(tmp_path / "notes.txt")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be read or written"):
        ReplyCache(tmp_path / "file" / "replies.sqlite")


def test_two_processes_may_use_a_cache(tmp_path: Path) -> None:
    reply = Reply("A", "judge", None, is_cut=False, input_tokens=1, output_tokens=2)
    with ReplyCache(tmp_path / "replies.sqlite") as ours, ReplyCache(tmp_path / "replies.sqlite") as theirs:
        ours.add("key", reply)
        theirs.add("key", Reply("B", "judge", None, is_cut=False, input_tokens=1, output_tokens=2))
        assert theirs.get("key") == reply
        assert ours.get("another") is None


def test_a_request_is_known_by_all_it_says() -> None:
    keys = {
        request_key("http://a/v1/", request("a")),
        request_key("http://b/v1/", request("a")),
        request_key("http://a/v1/", request("b")),
        request_key("http://a/v1/", request("a", seed=1)),
        request_key("http://a/v1/", json.loads(json.dumps(request("a")))),
    }
    assert len(keys) == 4
