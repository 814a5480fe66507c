"""What clients do who mean no good, or know no better: nothing of it may cost the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from personalized_soups.declare.profile import Profile
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web import connections
from personalized_soups.serving.web.settings import ApiKey, Rules, Settings
from tests.experts import write_expert
from tests.mixing.worlds import write_experts
from tests.serving.servers import Reply, RunningServer, running, send_raw

BODY: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "wash it"}], "max_tokens": 2}


def _is_open(sent: socket.socket) -> bool:
    sent.setblocking(False)
    try:
        return sent.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def _connected(served: RunningServer, data: bytes = b"") -> socket.socket:
    sent = socket.create_connection(("127.0.0.1", served.port), timeout=250)
    sent.sendall(data)
    return sent


@pytest.fixture
def impatient(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """A server whose deadlines are short, with experts of its own."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.4)
    write_experts(tmp_path / "experts")
    settings = Settings("small", limits=Limits(max_rows=4, max_waiting=4, max_context=256))
    with running(small_base, tmp_path / "experts", settings, profiles=tmp_path / "secret-place" / "p.db") as found:
        yield found


@pytest.fixture(autouse=True)
def _place(tmp_path: Path) -> None:
    (tmp_path / "secret-place").mkdir()


@pytest.mark.parametrize("data", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_who_says_nothing_or_half_a_head_is_let_go(impatient: RunningServer, data: bytes) -> None:
    with _connected(impatient, data) as sent:
        began = time.monotonic()
        impatient.wait_until(lambda: not _is_open(sent))
        assert time.monotonic() - began > 0.3  # and not at once: HEAD_SECONDS is 0.4


def _whole_answer(sent: socket.socket) -> bytes:
    """Return an answer, head and body, which may arrive in several parts."""
    came = b""
    while not (match := re.search(rb"(?is)content-length: (\d+).*?\r\n\r\n", came)) or (
        len(came) < match.end() + int(match[1])
    ):
        part = sent.recv(1000)
        assert part, came
        came += part
    return came


def test_half_a_head_after_a_whole_request_is_let_go_and_a_quiet_connection_is_kept(impatient: RunningServer) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with _connected(impatient, whole) as quiet, _connected(impatient, whole) as half:
        for sent in (quiet, half):
            assert b" 200 " in _whole_answer(sent)
        half.sendall(b"GET /health HTTP/1.1\r\nHost: lo")
        impatient.wait_until(lambda: not _is_open(half))
        assert _is_open(quiet)  # its time is the keep-alive's
        quiet.setblocking(True)
        quiet.sendall(whole)
        assert b" 200 " in _whole_answer(quiet)


@pytest.mark.parametrize("header", [b"X: " + b"x" * 200_000, b"\r\n".join(b"X%d: y" % n for n in range(20_000))])
def test_a_head_that_does_not_end_is_refused(served: RunningServer, header: bytes) -> None:
    with _connected(served) as sent, contextlib.suppress(ConnectionError):
        sent.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header)
        assert b" 431 " in sent.recv(1000)
    assert served.ask("GET", "/health").status == 200


def test_a_head_of_a_decent_size_is_read(served: RunningServer) -> None:
    assert served.ask("GET", "/health", headers={"X": "x" * 30_000}).status == 200


def test_who_does_not_read_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's buffers hold megabytes, so this test calls what uvicorn's transport calls once they are full."""
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 100.0)

    class Transport(asyncio.Transport):
        aborted = 0

        def abort(self) -> None:
            self.aborted += 1

        def close(self) -> None:
            raise AssertionError("a close waits for what is not read")

    async def run(*, reads: bool, ends: bool) -> int:
        config = uvicorn.Config(lambda: None, http=connections.PatientProtocol)
        config.load()
        protocol = connections.PatientProtocol(config, ServerState(), {}, asyncio.get_running_loop())
        transport = Transport()
        protocol.connection_made(transport)
        protocol.pause_writing()
        await asyncio.sleep(0.03)
        if reads:
            protocol.resume_writing()
        if ends:
            protocol.connection_lost(ConnectionError())
        await asyncio.sleep(0.2)
        if not ends:
            protocol.connection_lost(ConnectionError())
        return transport.aborted

    assert asyncio.run(run(reads=False, ends=False)) == 1
    assert asyncio.run(run(reads=True, ends=False)) == 0
    assert asyncio.run(run(reads=False, ends=True)) == 0


def test_more_answers_than_there_are_places_for_are_refused_before_anything_is_made(served: RunningServer) -> None:
    limits = served.server.batcher.limits
    most = limits.max_rows + limits.max_waiting
    body = {"model": "small", "prompt": [[5]] * 20_000, "n": 64, "max_tokens": 1}
    reply = served.ask("POST", "/v1/completions", body)
    assert (reply.status, reply.error["param"]) == (400, "n")
    assert f"at most {most}" in reply.error["message"]
    assert "retry-after" not in reply.headers
    assert served.ask("POST", "/v1/completions", {**body, "prompt": [], "n": 1}).status == 400


def test_reloads_without_end_let_answers_through(impatient: RunningServer) -> None:
    ending = threading.Event()
    reloaded: list[Reply] = []

    def reload() -> None:
        while not ending.is_set():
            reloaded.append(impatient.ask("POST", "/v1/experts/reload"))

    threads = [threading.Thread(target=reload) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert impatient.ask("POST", "/v1/chat/completions", BODY).status == 200
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert {reply.status for reply in reloaded} == {200}


def test_experts_are_listed_while_they_change(impatient: RunningServer, tmp_path: Path) -> None:
    ending = threading.Event()

    def change() -> None:
        while not ending.is_set():
            write_expert(tmp_path / "experts" / "new", seed=9)
            impatient.ask("POST", "/v1/experts/reload")
            shutil.rmtree(tmp_path / "experts" / "new")
            impatient.ask("POST", "/v1/experts/reload")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {impatient.ask("GET", "/v1/experts").status for _ in range(80)} == {200}
    finally:
        ending.set()
        thread.join()


def test_a_conversation_goes_on_with_the_answer_as_the_client_got_it(served: RunningServer) -> None:
    client = served.client()
    messages: list[Any] = [{"role": "user", "content": "wash it"}]
    answer = client.chat.completions.create(model="small", messages=messages, max_tokens=4, temperature=0)
    messages += [answer.choices[0].message, {"role": "user", "content": "and then?"}]
    again = client.chat.completions.create(model="small", messages=messages, max_tokens=4, temperature=0)
    plain: list[Any] = [{"role": "assistant", "content": answer.choices[0].message.content}]
    want = served.model.generate([[messages[0], *plain, messages[2]]], [None], max_new_tokens=4)[0]
    assert str(again.choices[0].message.content).strip() == want
    odd = {**BODY, "messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]}
    assert served.ask("POST", "/v1/chat/completions", odd).error["param"] == "messages.0.tool_calls"


def test_what_a_client_is_told_names_no_folder_of_this_machine(impatient: RunningServer, tmp_path: Path) -> None:
    assert impatient.store is not None
    impatient.store.put(Profile(user="v", weights={"warm": 1.0}))
    replies = []
    (tmp_path / "experts" / "cold" / "adapter_model.safetensors").write_bytes(b"damaged")
    replies.append(impatient.ask("POST", "/v1/experts/reload"))
    assert replies[0].status == 409
    assert "cold: " in replies[0].error["message"]
    shutil.rmtree(tmp_path / "experts" / "cold")
    shutil.rmtree(tmp_path / "experts" / "warm")
    replies.append(impatient.ask("POST", "/v1/chat/completions", {**BODY, "model": "soup:v"}))
    impatient.ask("POST", "/v1/experts/reload")
    replies.append(impatient.ask("POST", "/v1/chat/completions", {**BODY, "model": "soup:v"}))
    assert replies[-1].status == 422
    assert "'warm'" in replies[-1].error["message"]
    replies.append(impatient.ask("GET", "/v1/models/soup:v"))
    shutil.rmtree(tmp_path / "experts")
    replies.append(impatient.ask("POST", "/v1/experts/reload"))
    (tmp_path / "secret-place").rename(tmp_path / "away")
    replies.append(impatient.ask("GET", "/v1/profiles/v"))
    for reply in replies:
        assert reply.status >= 400
        assert str(tmp_path) not in reply.body.decode()
        assert "secret-place" not in reply.body.decode()


def test_the_fingerprint_changes_with_the_experts_tensors(impatient: RunningServer, tmp_path: Path) -> None:
    def output() -> str:
        return str(impatient.ask("POST", "/v1/chat/completions", BODY).json["system_fingerprint"])

    before = output()
    impatient.ask("POST", "/v1/experts/reload")
    assert output() == before
    shutil.rmtree(tmp_path / "experts" / "warm")
    write_expert(tmp_path / "experts" / "warm", seed=77)
    impatient.ask("POST", "/v1/experts/reload")
    assert output() != before


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://["},
        {"Origin": "http://[::1"},
        {"Host": "localhost@evil.example"},
        {"Host": "evil.example@localhost"},
        {"Host": "localhost/evil"},
    ],
)
def test_odd_names_are_refused_in_form(served: RunningServer, headers: dict[str, str]) -> None:
    host = headers.get("Host", "")
    reply = served.ask("GET", "/v1/models", headers=None if host else headers, host=host)
    assert reply.status in {403, 421}
    assert reply.error["message"]
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_a_length_of_many_digits_is_refused_in_form(served: RunningServer) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {'0' * 5000}7\r\n\r\n"
    with _connected(served, head.encode()) as sent:
        status = sent.recv(1000).split(b"\r\n")[0]
    assert b" 413 " in status or b" 400 " in status


def test_two_hosts_are_one_too_many(served: RunningServer) -> None:
    with _connected(served, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n") as sent:
        assert b" 400 " in sent.recv(1000).split(b"\r\n")[0]


def test_what_is_refused_is_not_read_to_its_end(small_base: Path, expert_folders: Path) -> None:
    rules = Rules(keys=[ApiKey("a-key-of-more-than-sixteen-letters")])
    with running(small_base, expert_folders, Settings("small", rules=rules, limits=Limits(max_context=256))) as served:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        with _connected(served, head) as sent:
            assert b" 401 " in sent.recv(1000)
            with pytest.raises(ConnectionError):
                sent.sendall((b"10000\r\n" + b"x" * 65536 + b"\r\n") * 200)


def test_a_timeout_while_nobody_reads_is_no_crash(
    small_base: Path, expert_folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings("small", limits=Limits(max_rows=4, max_context=256), request_seconds=0.5)
    body = {**BODY, "max_tokens": 200, "n": 4, "stream": True, "logprobs": True, "top_logprobs": 20,
            "logit_bias": {"1": -100}}  # fmt: skip
    with caplog.at_level(logging.ERROR), running(small_base, expert_folders, settings) as served:
        sent = send_raw(served.port, "/v1/chat/completions", body)
        served.wait_until(lambda: served.server.batcher.load.running > 0)
        served.wait_until(served.is_idle)  # the answers are done, or their time is over
        output = b""
        while not output.rstrip().endswith(b"\r\n0"):
            part = sent.recv(1 << 16)
            if not part:
                break
            output += part
        sent.close()
        served.wait_until(served.is_idle)
    assert b"[DONE]" in output
    assert [record.message for record in caplog.records if "Exception in ASGI" in record.message] == []


def test_who_writes_without_end_does_not_keep_others_from_asking(impatient: RunningServer) -> None:
    import sqlite3

    assert impatient.store is not None
    impatient.store.put(Profile(user="u", weights={"warm": 1.0}))
    path = next(Path(impatient.store._database.where).parent.glob("*.db"))
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    threads = [
        threading.Thread(target=impatient.ask, args=("PUT", f"/v1/profiles/u{number}", {"weights": {"warm": 0.5}}))
        for number in range(45)
    ]
    try:
        for thread in threads:
            thread.start()
        assert impatient.ask("GET", "/ready").status == 200
        assert impatient.ask("GET", "/v1/profiles/u").status == 200
        assert impatient.ask("POST", "/v1/chat/completions", {**BODY, "model": "soup:u"}).status == 200
        assert all(thread.is_alive() for thread in threads)  # no writer was waited for
    finally:
        lock.execute("ROLLBACK")
        lock.close()
        for thread in threads:
            thread.join()


def test_a_browsers_openai_client_is_let_through_where_its_page_is_invited(
    small_base: Path, expert_folders: Path
) -> None:
    rules = Rules(origins=["https://app.example"])
    with running(small_base, expert_folders, Settings("small", rules=rules, limits=Limits(max_context=256))) as served:
        asked = "authorization,content-type,x-stainless-os,x-stainless-lang"
        headers = {"Origin": "https://app.example", "Access-Control-Request-Headers": asked}
        assert served.ask("OPTIONS", "/v1/models", headers=headers).headers["access-control-allow-headers"] == asked
        assert "Origin" in served.ask("GET", "/v1/models").headers["vary"]  # caches keep them apart


def test_numbers_are_numbers_and_no_more_tokens_are_biased_than_may_be(served: RunningServer) -> None:
    for odd in ({"n": "2"}, {"max_tokens": True}, {"temperature": "1"}, {"stream": "yes"},
                {"logit_bias": {str(number): 1 for number in range(1025)}}):  # fmt: skip
        assert served.ask("POST", "/v1/chat/completions", {**BODY, **odd}).status == 400
    assert served.ask("POST", "/v1/completions", {"model": "small", "prompt": [True, True]}).status == 400
    reply = served.ask("POST", "/v1/completions", {"model": "small", "prompt": 3})
    assert reply.error["param"] == "prompt"
    fine = {**BODY, "temperature": 1, "stream_options": None, "stream": False, "logit_bias": {}}
    assert served.ask("POST", "/v1/chat/completions", fine).status == 200


def test_refusals_have_their_route_in_the_metrics(served: RunningServer) -> None:
    served.ask("POST", "/v1/chat/completions", {"model": "small"}, host="evil.example")
    served.ask("GET", "/v1/profiles/somebody", host="evil.example")
    text = served.ask("GET", "/metrics").body.decode()
    assert 'psoups_requests_total{route="/v1/chat/completions",status="421"}' in text
    assert 'psoups_requests_total{route="/v1/profiles/{user:any}",status="421"}' in text
    assert "somebody" not in text


def test_a_probe_may_ask_for_the_head_alone(served: RunningServer) -> None:
    for path in ("/health", "/ready"):
        assert served.ask("HEAD", path).status == 200


def _load(served: RunningServer) -> tuple[int, int]:
    load = served.server.batcher.load
    return load.running, load.waiting


def test_an_end_waits_for_no_body_and_tells_those_it_cuts_off(small_base: Path, expert_folders: Path) -> None:
    settings = Settings("small", limits=Limits(max_rows=1, max_context=256), grace_seconds=1.0)
    long = {**BODY, "max_tokens": 200, "n": 40, "logit_bias": {"1": -100}}
    with running(small_base, expert_folders, settings) as served:
        half = _connected(served, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx")
        waiting = [
            send_raw(served.port, "/v1/chat/completions", {**long, "stream": stream}) for stream in (False, True)
        ]
        served.wait_until(lambda: sum(_load(served)) == 80)  # both requests are submitted
        served.server.refuse_bodies()
        assert b" 503 " in half.recv(1000)
        served.server.close()
        answer = _whole_answer(waiting[0])
        assert b" 503 " in answer.split(b"\r\n")[0]
        assert b"the server has shut down" in answer
        for sent in (half, *waiting):
            sent.close()
