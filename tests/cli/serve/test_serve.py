"""`psoups serve` and `psoups playground` as processes: started, queried, stopped in the middle of an answer."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.cli.app import build_app
from personalized_soups.cli.bases import LoadOptions
from personalized_soups.cli.serve.server_run import ServedFiles, ServerRun
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.settings import ApiKey, Rules, Settings
from tests.cli.conftest import Run
from tests.mixing.worlds import write_experts
from tests.serving.web.routes.pools import pool_of

pytestmark = pytest.mark.slow


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    write_experts(tmp_path / "experts")
    return tmp_path / "experts"


def _serve(base: Path, experts: Path) -> list[str]:
    return ["serve", "--base", str(base), "--experts", str(experts), "--port", "0"]


@contextmanager
def _process(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command, and yield it with the address that it prints."""
    command = [sys.executable, "-m", "personalized_soups", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        printed = ""
        while "playground   http" not in printed:
            line = process.stderr.readline()
            assert line, printed
            printed += line
        yield process, printed.split("playground   ")[1].split("/playground")[0]
    finally:
        process.kill()
        process.communicate()


def _get(address: str, path: str) -> Any:
    with urllib.request.urlopen(address + path, timeout=250) as reply:
        return json.loads(reply.read())


def _ask(address: str, **options: Any) -> socket.socket:
    body = {"model": "small_base0", "messages": [{"role": "user", "content": "wash it"}], "max_tokens": 200,
            "logit_bias": {"1": -100}, "stream": True, **options}  # fmt: skip
    data = json.dumps(body).encode()
    host, port = address.removeprefix("http://").split(":")
    sent = socket.create_connection((host, int(port)), timeout=250)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close"
    sent.sendall(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return sent


def _rest(sent: socket.socket) -> str:
    parts = []
    while part := sent.recv(1 << 16):
        parts.append(part)
    sent.close()
    return b"".join(parts).decode()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_finishes_running_answers(small_base: Path, experts: Path, ending: signal.Signals) -> None:
    with _process(*_serve(small_base, experts)) as (process, address):
        assert _get(address, "/ready") == {"status": "ready"}
        sent = _ask(address)
        assert sent.recv(10).startswith(b"HTTP/1.1")
        process.send_signal(ending)
        events = _rest(sent)
        assert events.rstrip().endswith("0")  # the last chunk of the body
        assert "[DONE]" in events
        assert '"finish_reason":"length"' in events
        assert process.wait() == 0
        assert process.stderr is not None
        assert process.stderr.read().strip().endswith("stopped")


def test_a_second_ctrl_c_stops_at_once(small_base: Path, experts: Path) -> None:
    with _process(*_serve(small_base, experts), "--max-rows", "1") as (process, address):
        waiting = [_ask(address, n=60) for _ in range(3)]
        waiting[0].recv(10)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert any("finishing" in line for line in process.stderr)  # the first signal was handled
        process.send_signal(signal.SIGINT)
        process.wait()
        finished = sum(_rest(sent).count('"finish_reason":"length"') for sent in waiting)
        assert finished < 3 * 60  # all answers would take minutes; the process did not wait for them


def test_stored_profiles_survive_a_killed_server(small_base: Path, experts: Path, tmp_path: Path) -> None:
    store = tmp_path / "profiles.db"
    arguments = [*_serve(small_base, experts), "--profiles", str(store)]
    body = json.dumps({"weights": {"warm": 0.5}}).encode()
    with _process(*arguments) as (process, address):
        request = urllib.request.Request(f"{address}/v1/profiles/ada", body, {"Content-Type": "application/json"})
        request.method = "PUT"
        assert urllib.request.urlopen(request, timeout=250).status == 201
        request.data = json.dumps({"weights": {"wam": 0.5}}).encode()
        with pytest.raises(urllib.error.HTTPError, match="422"):  # the store refuses what can't be served
            urllib.request.urlopen(request, timeout=250)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with _process(*arguments) as (_, address):
        assert _get(address, "/v1/profiles/ada")["profile"]["weights"] == {"warm": 0.5}


def test_keys_names_and_limits_are_applied(small_base: Path, experts: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-that-nobody-guesses\n")
    keys.chmod(0o600)
    limits = ["--max-context", "64", "--cache-memory", "0.5", "--default-max-tokens", "3"]
    with _process(*_serve(small_base, experts), "--api-key-file", keys, "--name", "house", *limits) as (_, address):
        body: dict[str, Any] = {"model": "house", "messages": [{"role": "user", "content": "wash it"}]}

        def ask(**options: Any) -> Any:
            headers = {"Content-Type": "application/json", "Authorization": "Bearer a-key-that-nobody-guesses"}
            data = json.dumps({**body, **options}).encode()
            request = urllib.request.Request(f"{address}/v1/chat/completions", data, headers)
            return json.loads(urllib.request.urlopen(request, timeout=250).read())

        assert ask(logit_bias={"1": -100})["usage"]["completion_tokens"] == 3
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(max_tokens=64)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            _get(address, "/v1/models")


def test_the_playground_command_serves_its_page(small_base: Path, experts: Path) -> None:
    with (
        _process("playground", *_serve(small_base, experts)[1:]) as (_, address),
        urllib.request.urlopen(f"{address}/playground/", timeout=250) as page,
    ):
        assert b"<html" in page.read()


@pytest.mark.parametrize("command", ["serve", "playground"])
def test_questions_are_asked(small_base: Path, experts: Path, tmp_path: Path, command: str) -> None:
    pool_of(experts).write(tmp_path / "questions")
    stored = ("--profiles", tmp_path / "p.db", "--questions", tmp_path / "questions")
    with _process(command, *_serve(small_base, experts)[1:], *stored) as (process, address):
        state = _get(address, "/v1/profiles/ada/questions")
        assert (state["question"]["number"], state["num_questions"]) == (1, 10)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "asks users up to 10 of 40 questions" in process.stderr.read()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--host", "0.0.0.0"], "would accept requests without a key"),
        (["--max-context", "100000"], "larger than the base's limit of 256"),
        (["--cors-origin", "app.example"], "is not a valid origin"),
        (["--cors-origin", "https://app.example/page"], "is not a valid origin"),
        (["--api-key-file", "nothing"], "the API keys cannot be read"),
        (["--profiles", "mysql://x"], "mysql"),
        (["--dimensions", "nothing.yaml"], "nothing.yaml"),
        (["--dtype", "int8"], "int8"),
        (["--questions", "nothing"], "are kept in a store, but no store is given"),
        (["--questions", "nothing", "--profiles", "p.db"], "the folder of questions does not exist"),
        (["--certainty", "0.5"], "a certainty of 0.5 is reached without any question"),
    ],
)
def test_wrong_options_are_reported_before_serving(
    psoups: Callable[..., tuple[int, str, str]], small_base: Path, experts: Path, more: list[str], what: str
) -> None:
    code, _, printed = psoups(*_serve(small_base, experts), *more)
    assert code == 2
    assert what in printed
    assert "mend:" in printed


def test_a_port_in_use_is_reported(
    psoups: Callable[..., tuple[int, str, str]], small_base: Path, experts: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, printed = psoups("serve", "--base", str(small_base), "--experts", str(experts), "--port", port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in printed


class _Base:
    """A base without a limit of positions."""

    def __init__(self) -> None:
        self.model = self.config = self
        self.max_position_embeddings = None
        self.experts = {"warm": None, "cold": None}

    def get_text_config(self, *, decoder: bool) -> _Base:
        assert decoder
        return self


def _run_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ServerRun:
    """Return the run that `psoups serve` would start."""
    runs: list[ServerRun] = []

    def keep(run: ServerRun) -> None:
        runs.append(run)

    monkeypatch.setattr(ServerRun, "run", keep)
    with pytest.raises(SystemExit) as exit_code:
        build_app()(["serve", *arguments])
    assert not exit_code.value.code
    return runs[0]


def test_every_option_reaches_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = _Base()
    what = ("--base", str(tmp_path), "--experts", "a", "--experts", "b")
    run = _run_of(
        monkeypatch, *what, "--host", "::1", "--max-rows", "3", "--max-waiting", "5", "--max-requests", "7",
        "--max-context", "11", "--default-max-tokens", "13", "--read-tokens", "17", "--cache-memory", "0.25",
        "--max-body", "0.5", "--request-timeout", "19", "--grace", "23", "--allow-host", "Soups.Example",
        "--cors-origin", "https://app.example", "--users-in-metrics", "--profiles", "p.db", "--port", "9",
        "--answer-retention", "1.5", "--questions", "q", "--num-questions", "6", "--certainty", "0.9",
        "--answers-per-minute", "30",
        "--dimensions", "d.yaml", "--api-key-file", "keys", "--device", "cpu", "--dtype", "bfloat16", "--same-base",
    )  # fmt: skip
    assert run.completed_settings([ApiKey("a key")], base) == Settings(
        tmp_path.name,
        Rules([ApiKey("a key")], ["::1", "soups.example"], ["https://app.example"], max_body=2**19, max_requests=7),
        Limits(max_rows=3, max_waiting=5, max_context=11, read_tokens=17, cache_bytes=2**28),
        default_max_tokens=13, request_seconds=19.0, grace_seconds=23.0, users_in_metrics=True,
        answer_retention=timedelta(hours=36), num_questions=6, certainty=0.9, answers_per_minute=30,
        started_with=list(what),
    )  # fmt: skip
    assert run == ServerRun(
        LoadOptions(str(tmp_path), "cpu", "bfloat16", same_base=True),
        ServedFiles([Path("a"), Path("b")], "p.db", Path("q"), Path("d.yaml"), Path("keys")), run.settings,
        host="::1", port=9, max_context=11, cache_memory=0.25,
    )  # fmt: skip


def test_the_defaults_are_the_servers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run_of(monkeypatch, "--base", "org/base", "--experts", "a")
    assert run.settings == Settings(
        "org/base", Rules(hosts=["127.0.0.1"]), started_with=["--base", "org/base", "--experts", "a"]
    )
    assert _run_of(monkeypatch, "--base", "org/base", "--experts", "a", "--name", "house").settings.base == "house"


def test_a_retention_needs_a_store(psoups: Run) -> None:
    code, _, err = psoups("serve", "--base", "org/base", "--experts", "a", "--answer-retention", "30")
    assert (code, "no answers are stored, because --profiles is not given" in " ".join(err.split())) == (2, True)


def test_an_ipv6_address_is_printed_in_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base: Any = _Base()
    run = _run_of(monkeypatch, "--base", str(tmp_path), "--experts", "a", "--host", "::1")
    run.report_start(base, 8123)
    printed = capsys.readouterr().err
    assert "http://[::1]:8123/playground/" in printed
    assert "with 2 experts: warm, cold" in printed
    assert "--profiles" in printed
