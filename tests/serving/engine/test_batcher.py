"""The batcher: every request gets the answer that it gets alone, once, regardless of the other requests."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personalized_soups import SoupModel
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.errors import DeclarationError, InputError, RunError, UsageError
from personalized_soups.serving.engine import queue as queue_module
from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.engine.detokenizer import Detokenizer
from personalized_soups.serving.engine.limits import Limits, max_context_of
from personalized_soups.serving.engine.queue import ClosedError, QueueFullError
from personalized_soups.serving.engine.request import Finish, GenerationRequest, Piece
from personalized_soups.serving.engine.token_sampler import SamplingParams
from tests.experts import write_expert
from tests.serving.engine.worlds import (
    DEADLINE,
    Forwards,
    RunningBatcher,
    check_alone,
    greedy,
    small_model,
    small_soup,
    some_request,
    some_weights,
)

LONG = 60  # tokens of an answer that is still running when a test goes on


@pytest.fixture(scope="module")
def tokenizer(small_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_base)


@pytest.fixture(scope="module")
def soup(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> SoupModel:
    return small_soup(tmp_path_factory.mktemp("llama"), tokenizer=tokenizer)


@pytest.fixture
def changing(tmp_path: Path, tokenizer: Any) -> SoupModel:
    """Return a model whose experts the test may change."""
    return small_soup(tmp_path / "experts", tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.CRITICAL, "personalized_soups.serving.engine")
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "batcher"]


def _requests(count: int, seed: int = 0, **options: Any) -> list[GenerationRequest]:
    chance = random.Random(seed)
    return [some_request(chance, **options) for _ in range(count)]


def _submit_and_hold(
    soup: SoupModel, running: RunningBatcher, request: GenerationRequest
) -> tuple[Forwards, threading.Event]:
    """Submit a request, and make the batcher wait in its first step until the event is set."""
    forwards, go = Forwards(soup), threading.Event()
    reached = threading.Event()

    def wait(number: int) -> None:
        if number >= 1:
            reached.set()
            assert go.wait(DEADLINE)

    forwards.before = wait
    running.batcher.submit([request])
    assert reached.wait(DEADLINE)
    return forwards, go


# Answers.


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), read=st.sampled_from([4, 9, 4096]), rows=st.sampled_from([1, 3, 64]))
def test_answers_are_those_of_each_request_alone_whenever_it_arrives(
    soup: SoupModel, seed: int, read: int, rows: int
) -> None:
    chance = random.Random(seed)
    requests = [some_request(chance, most=10, longest=24) for _ in range(9)]
    with RunningBatcher(soup, Limits(read_tokens=read, max_rows=rows)) as running:
        rest = list(requests)
        while rest:
            count = chance.randint(1, 3)
            running.batcher.submit(rest[:count])
            rest = rest[count:]
            time.sleep(chance.random() * 0.01)  # any delay is right: it varies which requests are read together
        running.delivered.wait_for(requests)
        check_alone(soup, running, requests)


def test_draws_are_those_of_generate(soup: SoupModel) -> None:
    prompts = ["wash the kettle", "rub", "dry it with a clean towel", "old"]
    weights = [some_weights(random.Random(place)) for place in range(4)]
    want = soup.generate(prompts, weights, temperature=0.9, seed=5, max_new_tokens=12)
    requests = [
        GenerationRequest(soup.generator.encoded(prompt), row, 12, SamplingParams(temperature=0.9, seed=5, place=place))
        for place, (prompt, row) in enumerate(zip(prompts, weights, strict=True))
    ]
    with RunningBatcher(soup) as running:
        running.answer(requests[:1])
        running.answer(requests[1:][::-1])
        assert [running.delivered.text(request).strip() for request in requests] == want


def test_stop_strings_end_tokens_and_lengths_end_an_answer(soup: SoupModel, tokenizer: Any) -> None:
    plain = GenerationRequest(list(range(60, 70)), ExpertWeights({"warm": 1.0}), 30, ignore_eos=True)
    with RunningBatcher(soup) as running:
        running.answer([plain])
        tokens = running.delivered.tokens(plain)
        assert len(tokens) == 30
        assert running.delivered.pieces[plain][-1].finish == Finish.LENGTH
        whole = running.delivered.text(plain)
        stop = whole[len(whole) // 2 :][:3]
        stopped = GenerationRequest(plain.tokens, plain.weights, 30, stops=[stop], ignore_eos=True)
        unmatched = GenerationRequest(plain.tokens, plain.weights, 30, stops=["not in the text"], ignore_eos=True)
        one = GenerationRequest(plain.tokens, plain.weights, 1, ignore_eos=True)
        running.answer([stopped, unmatched, one])
        assert running.delivered.text(stopped) == whole[: whole.index(stop)]
        assert running.delivered.pieces[stopped][-1].finish == Finish.STOP
        assert len(running.delivered.tokens(stopped)) < 30
        assert running.delivered.text(unmatched) == whole
        assert running.delivered.tokens(one) == tokens[:1]
        # a bias of 100 makes the end token the likeliest
        ended = GenerationRequest(plain.tokens, plain.weights, 30, SamplingParams(logit_bias={1: 100.0}, logprobs=1))
        going = GenerationRequest(
            plain.tokens, plain.weights, 30, SamplingParams(logit_bias={1: 100.0}), ignore_eos=True
        )
        running.answer([ended, going])
        (piece,) = running.delivered.pieces[ended]
        assert (piece.token, piece.text, piece.finish) == (1, "", Finish.STOP)
        assert piece.logprobs is not None
        assert running.delivered.tokens(going) == [1] * 30
        assert running.delivered.text(going) == ""


# Passes, rows, memory.


def test_prompts_are_read_together_and_rows_step_together(soup: SoupModel) -> None:
    requests = _requests(8, most=1)
    for request in requests:
        request.max_new_tokens, request.ignore_eos = 5, True
    steps: list[int] = []
    with RunningBatcher(soup, on_step=lambda rows, seconds: steps.append(rows)) as running, Forwards(soup) as forwards:
        running.answer(requests)
    assert forwards.shapes == [(8, max(len(request.tokens) for request in requests)), *[(8, 1)] * 4]
    assert steps == [8] * 4


def test_at_most_read_tokens_are_read_at_once(soup: SoupModel) -> None:
    first = GenerationRequest(list(range(6, 16)), ExpertWeights(), LONG, ignore_eos=True)
    requests = [
        GenerationRequest(list(range(6, 6 + count)), ExpertWeights(), 2, ignore_eos=True)
        for count in (7, 7, 7, 3, 50, 4)
    ]
    with RunningBatcher(soup, Limits(read_tokens=20)) as running:
        forwards, go = _submit_and_hold(soup, running, first)
        with forwards:
            running.batcher.submit(requests)
            go.set()
            running.delivered.wait_for(requests)
        reads = [shape for shape in forwards.shapes[1:] if shape[1] > 1]
    assert reads == [(2, 7), (2, 7), (1, 20), (1, 20), (1, 10), (1, 4)]
    # the running rows take a step between two reads
    places = [place for place, shape in enumerate(forwards.shapes) if shape[1] > 1]
    assert all(after > before + 1 for before, after in pairwise(places))


def test_requests_start_in_the_order_of_their_arrival(soup: SoupModel) -> None:
    requests = _requests(20, seed=3, most=6)
    with RunningBatcher(soup, Limits(max_rows=3)) as running:
        running.answer(requests)
        assert list(running.delivered.pieces) == requests  # in the order of their first pieces


def test_at_most_max_rows_run(soup: SoupModel) -> None:
    requests = _requests(12, seed=4, most=6)
    with RunningBatcher(soup, Limits(max_rows=3)) as running, Forwards(soup) as forwards:
        running.answer(requests)
    assert max(rows for rows, _ in forwards.shapes) == 3


@pytest.mark.parametrize("read", [16, 4096])
def test_at_most_cache_bytes_are_allocated_unless_a_single_request_needs_more(soup: SoupModel, read: int) -> None:
    token_bytes = 512
    limit = 4 * 64 * token_bytes
    chance = random.Random(2)
    requests = [some_request(chance, most=9, longest=20) for _ in range(12)]
    requests.insert(
        3, GenerationRequest(list(range(6, 206)), ExpertWeights({"warm": 0.5}), 5)
    )  # within the limit alone
    requests.insert(
        8, GenerationRequest([7 + place % 300 for place in range(240)], ExpertWeights(), 16)
    )  # beyond it, alone
    allocated: list[tuple[int, int]] = []
    with (
        RunningBatcher(soup, Limits(cache_bytes=limit, read_tokens=read, max_context=512)) as running,
        Forwards(soup) as forwards,
    ):
        # before each pass: after every allocation except the first one
        forwards.before = lambda _: allocated.append((running.batcher.load.cache_bytes, running.batcher.load.running))
        running.answer(requests)
    check_alone(soup, running, requests)
    beyond = [rows for size, rows in allocated if size > limit]
    assert beyond == [1] * len(beyond)
    assert beyond  # the long request
    assert max(rows for _, rows in allocated) >= 3
    # the memory of the long request is freed for the others
    assert allocated[-1][0] <= limit


def test_an_idle_batcher_frees_its_memory(soup: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "_IDLE_SECONDS", 0.01)
    allocated: list[int] = []
    with RunningBatcher(soup) as running:
        running.delivered.on_pieces = lambda _: allocated.append(running.batcher.load.cache_bytes)
        running.answer(_requests(3))
        assert min(allocated) > 0
        _until(lambda: running.batcher.load.cache_bytes == 0)
        assert running.batcher.load.running == running.batcher.load.waiting == 0


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# The queue.


def test_a_full_queue_rejects_requests_together_and_answers_those_before(soup: SoupModel) -> None:
    with RunningBatcher(soup, Limits(max_rows=1, max_waiting=3)) as running:
        first, *requests = _requests(6, seed=5)
        forwards, go = _submit_and_hold(
            soup, running, GenerationRequest(first.tokens, first.weights, LONG, ignore_eos=True)
        )
        running.batcher.submit(requests[:2])
        with pytest.raises(QueueFullError) as caught:
            running.batcher.submit(requests[2:4])
        assert "2 are waiting" in caught.value.what
        assert running.batcher.load.waiting == 2
        assert running.batcher.load.running == 1
        running.batcher.submit(requests[2:3])  # one more fits
        with pytest.raises(QueueFullError):
            running.batcher.submit(requests[3:4])
        go.set()
        running.delivered.wait_for(requests[:3])
        forwards.__exit__()
        check_alone(soup, running, requests[:3])
        assert not running.delivered.pieces.keys() & set(requests[3:])


def test_retry_after_follows_the_queue_and_the_seconds_of_an_answer(soup: SoupModel) -> None:
    with RunningBatcher(soup, Limits(max_rows=2, max_waiting=500)) as running:
        assert running.batcher.retry_after() == 1
        assert running.batcher.load.seconds_per_answer == 0
        requests = _requests(1)
        running.answer(requests)
        assert running.batcher.load.seconds_per_answer > 0
        running.batcher._scheduler.seconds_per_answer = 4.0
        forwards, go = _submit_and_hold(
            soup, running, GenerationRequest([7, 8], ExpertWeights(), LONG, ignore_eos=True)
        )
        waiting = _requests(9, seed=6)
        running.batcher.submit(waiting)
        assert running.batcher.retry_after() == 18  # nine requests wait for two rows that take four seconds each
        running.batcher._scheduler.seconds_per_answer = 1e9
        assert running.batcher.retry_after() == 60
        running.batcher.abort(waiting)
        go.set()
        forwards.__exit__()


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        (GenerationRequest([], ExpertWeights(), 3), "prompt has 0 tokens"),
        (GenerationRequest([7], ExpertWeights(), 0), "answer may have 0"),
        (GenerationRequest([7, 320], ExpertWeights(), 3), "ids from 7 to 320"),
        (GenerationRequest([7, -1], ExpertWeights(), 3), "ids from -1 to 7"),
        (GenerationRequest([7], ExpertWeights(), 3, SamplingParams(logit_bias={400: 1.0})), "ids from 7 to 400"),
        (GenerationRequest([7] * 200, ExpertWeights(), 57), "257 tokens together, but at most 256 fit"),
        (GenerationRequest([7] * 90, ExpertWeights(), 11), None),
    ],
)
def test_a_request_that_would_fail_a_shared_step_is_rejected(
    soup: SoupModel, rejected: GenerationRequest, message: str | None
) -> None:
    fine = _requests(1)
    with RunningBatcher(soup, Limits(max_context=512 if message else 100)) as running:
        with pytest.raises(InputError, match=message):
            running.batcher.submit([*fine, rejected])
        running.answer(fine)
        assert set(running.delivered.pieces) == set(fine)


def test_the_limits_are_those_of_the_model(soup: SoupModel) -> None:
    with RunningBatcher(soup) as running:
        assert running.batcher.limits == Limits(max_context=256)
    for name in ("max_rows", "max_context", "read_tokens"):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: 0})


def test_scheduled_weights_are_rejected(soup: SoupModel) -> None:
    with RunningBatcher(soup) as running, pytest.raises(UsageError, match="number of the generated token"):
        running.batcher.submit([GenerationRequest([7], ExpertWeights({"warm": lambda step: 0.5}), 3)])


def test_the_context_ends_where_one_row_would_change_the_rotation_of_all() -> None:
    from transformers import LlamaConfig, Phi3Config

    assert max_context_of(LlamaConfig(max_position_embeddings=300)) == 300
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    config = Phi3Config(**sizes, max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope)
    assert max_context_of(config) == 64


# Aborting.


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_an_aborted_request_frees_its_row_and_leaves_the_others_as_they_are(soup: SoupModel, seed: int) -> None:
    chance = random.Random(seed)
    requests = [some_request(chance, most=25, longest=24) for _ in range(14)]
    with RunningBatcher(soup, Limits(max_rows=4, read_tokens=8)) as running:
        running.batcher.submit(requests)
        aborted: set[GenerationRequest] = set()
        for _ in range(6):
            time.sleep(chance.random() * 0.01)  # any delay is right: it varies how far the answers are
            some = chance.sample(requests, 2)
            aborted.update(some)
            running.batcher.abort(some)
        kept = [request for request in requests if request not in aborted]
        running.delivered.wait_for(kept)
        check_alone(soup, running, kept)
        for request in aborted & running.delivered.pieces.keys():  # the part that was generated
            assert greedy(soup, request)[: len(running.delivered.tokens(request))] == running.delivered.tokens(request)
        _until(lambda: running.batcher.load.running == running.batcher.load.waiting == 0)


def test_requests_are_aborted_while_they_wait_are_read_or_run(soup: SoupModel) -> None:
    ran = GenerationRequest([7, 8, 9], ExpertWeights(), LONG, ignore_eos=True)
    read = GenerationRequest([7] * 100, ExpertWeights(), 2)
    waited, kept = _requests(2, seed=7)
    with RunningBatcher(soup, Limits(read_tokens=10, max_rows=2)) as running:
        forwards, go = _submit_and_hold(soup, running, ran)
        running.batcher.submit([read, waited, kept])
        passed = threading.Event()

        def look(_: int) -> None:
            if forwards.shapes[-1] == (1, 10) and len(forwards.shapes) > 6:
                running.batcher.abort([read, ran, waited])
                forwards.before = lambda _: None
                passed.set()

        forwards.before = look
        go.set()
        assert passed.wait(DEADLINE)
        running.delivered.wait_for([kept])
        forwards.__exit__()
        check_alone(soup, running, [kept])
        assert read not in running.delivered.pieces
        assert waited not in running.delivered.pieces
        assert not running.delivered.is_done(ran)
        assert sum(shape == (1, 10) for shape in forwards.shapes) < 10  # the rest of the prompt was not read


def test_aborting_requests_that_ended_or_never_arrived_leaves_nothing_behind(soup: SoupModel) -> None:
    with RunningBatcher(soup) as running:
        done = _requests(3)
        running.answer(done)
        running.batcher.abort([*done, *_requests(1000, seed=8)])
        _until(lambda: not running.batcher._queue._aborted)
        running.answer(_requests(1, seed=9))
        running.answer(done_again := _requests(3))
        check_alone(soup, running, done_again)


# Errors.


def test_an_error_in_a_step_ends_the_running_requests_only(soup: SoupModel) -> None:
    requests = _requests(3, seed=10)
    for request in requests:
        request.ignore_eos, request.max_new_tokens = True, 9
    later = _requests(2, seed=11)
    with RunningBatcher(soup, Limits(max_rows=3)) as running:

        def fail(number: int) -> None:
            if number == 3:
                raise RuntimeError("a kernel failed")

        with Forwards(soup) as forwards:
            forwards.before = fail
            running.answer([*requests, *later])
        for request in requests:
            running.delivered.check_ended_once(request)
            error = running.delivered.pieces[request][-1].error
            assert isinstance(error, RuntimeError)
            assert error.__traceback__ is None  # its frames hold tensors
            assert len(running.delivered.tokens(request)) == 3
        check_alone(soup, running, later)
        assert running.batcher.is_alive


def test_prompts_that_do_not_fit_into_memory_are_read_fewer_at_a_time(soup: SoupModel) -> None:
    requests = _requests(9, seed=12)
    with RunningBatcher(soup) as running, Forwards(soup) as forwards:

        def fail(_: int) -> None:
            rows, width = forwards.shapes[-1]
            if width > 1 and rows > 2:
                raise torch.OutOfMemoryError("no more")

        for request in requests:
            request.tokens = [*request.tokens, 7]
        forwards.before = fail
        running.answer(requests)
        check_alone(soup, running, requests)
        assert list(running.delivered.pieces) == requests


def test_a_prompt_that_fails_alone_ends_alone(soup: SoupModel) -> None:
    requests = _requests(7, seed=13)
    requests[3].tokens = [300, 301]
    with RunningBatcher(soup) as running:

        def fail(module: Any, arguments: Any, keywords: Any) -> None:
            if 301 in keywords["input_ids"][:, -1].tolist() and 300 in keywords["input_ids"].flatten().tolist():
                raise IndexError("an ill prompt")

        handle = soup.model.register_forward_pre_hook(fail, with_kwargs=True)
        running.answer(requests)
        handle.remove()
        running.delivered.check_ended_once(requests[3])
        (piece,) = running.delivered.pieces[requests[3]]
        assert isinstance(piece.error, IndexError)
        check_alone(soup, running, requests[:3] + requests[4:])


def test_no_request_waits_forever_after_an_error_at_any_time(soup: SoupModel) -> None:
    chance = random.Random(14)
    requests = [some_request(chance, most=10, longest=30) for _ in range(40)]
    with RunningBatcher(soup, Limits(max_rows=4, read_tokens=12)) as running, Forwards(soup) as forwards:

        def fail(_: int) -> None:
            if chance.random() < 0.1:
                raise chance.choice([RuntimeError, torch.OutOfMemoryError, KeyError, UsageError])(*"abc")

        forwards.before = fail
        running.answer(requests)
    fine = [request for request in requests if running.delivered.pieces[request][-1].error is None]
    assert 0 < len(fine) < len(requests)
    for request in requests:
        running.delivered.check_ended_once(request)
    check_alone(soup, running, fine)


def test_an_answer_whose_text_fails_ends_alone(soup: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _requests(4, seed=15)

    class Ill(Detokenizer):
        def add(self, token: int) -> str:
            if self._stops:
                raise ValueError("an ill text")
            return super().add(token)

    monkeypatch.setattr("personalized_soups.serving.engine.scheduler.Detokenizer", Ill)
    requests[1].stops = ["x"]
    with RunningBatcher(soup) as running:
        running.answer(requests)
        running.delivered.check_ended_once(requests[1])
        assert isinstance(running.delivered.pieces[requests[1]][-1].error, ValueError)
        check_alone(soup, running, [requests[0], *requests[2:]])


def test_logits_that_are_not_finite_end_the_request_with_an_error(soup: SoupModel) -> None:
    requests = _requests(4, seed=16)
    requests[2].tokens, requests[2].max_new_tokens = [7] * 40, 5

    def ill(module: Any, arguments: Any, keywords: Any, output: Any) -> Any:
        output.logits[keywords["input_ids"][:, -3:].eq(7).all(1) & (keywords["input_ids"].shape[1] > 3)] = torch.nan
        return output

    with RunningBatcher(soup) as running:
        handle = soup.model.register_forward_hook(ill, with_kwargs=True)
        running.answer(requests)
        handle.remove()
        (piece,) = running.delivered.pieces[requests[2]]
        assert isinstance(piece.error, RunError)
        assert "smaller weights" in piece.error.mend
        check_alone(soup, running, [*requests[:2], requests[3]])


def test_a_receiver_that_raises_loses_its_own_pieces_only(soup: SoupModel) -> None:
    requests = _requests(5, seed=17)
    for request in requests:
        request.ignore_eos, request.max_new_tokens = True, 30
    ill = requests[2]
    with RunningBatcher(soup) as running:

        def fail(pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
            if any(request is ill for request, _ in pieces):
                raise OSError("the receiver has closed")

        running.delivered.on_pieces = fail
        fine = [request for request in requests if request is not ill]
        running.batcher.submit(requests)
        running.delivered.wait_for(fine)
        running.delivered.on_pieces = lambda _: None
        for request in fine:
            running.delivered.check_ended_once(request)
            assert len(running.delivered.tokens(request)) == 30
        assert ill not in running.delivered.pieces  # it was aborted
        _until(lambda: running.batcher.load.running == 0)
        running.answer(later := _requests(2, seed=18))
        check_alone(soup, running, later)


def test_an_error_of_on_step_changes_nothing(soup: SoupModel) -> None:
    requests = _requests(3, seed=19)

    def fail(rows: int, seconds: float) -> None:
        raise ZeroDivisionError

    with RunningBatcher(soup, on_step=fail) as running:
        running.answer(requests)
        check_alone(soup, running, requests)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_request_waits_forever_after_the_thread_ends_unexpectedly(soup: SoupModel) -> None:
    requests = _requests(4, seed=20, most=9)
    with RunningBatcher(soup, Limits(max_rows=2)) as running, Forwards(soup) as forwards:

        def fail(number: int) -> None:
            if number == 2:
                raise SystemExit

        for request in requests:
            request.ignore_eos, request.max_new_tokens = True, 9
        forwards.before = fail
        running.answer(requests)
        for request in requests:
            running.delivered.check_ended_once(request)
            assert isinstance(running.delivered.pieces[request][-1].error, ClosedError)
        assert not running.batcher.is_alive
        with pytest.raises(ClosedError):
            running.batcher.submit(requests)


# Experts that change.


def test_jobs_run_while_no_answer_is_generated_and_waiting_requests_follow(changing: SoupModel, tmp_path: Path) -> None:
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in changing.layers.by_name.items()}
    new = write_expert(tmp_path / "more" / "new", seed=9, rank=2, alpha=2, shapes=shapes, base=None)
    with RunningBatcher(changing, Limits(max_rows=2)) as running:
        first = GenerationRequest([7, 8, 9], ExpertWeights({"warm": 1.0}), 20, ignore_eos=True)
        forwards, go = _submit_and_hold(changing, running, first)
        states: list[tuple[int, bool]] = []

        def add() -> str:
            states.append((running.batcher.load.running, running.delivered.is_done(first)))
            assert not torch.is_inference_mode_enabled()
            return changing.experts.add(new)

        added = running.batcher.run_when_idle(add)
        failed = running.batcher.run_when_idle(lambda: 1 // 0)
        cancelled: Future[int] = running.batcher.run_when_idle(lambda: 3)
        assert cancelled.cancel()
        waiting = [
            GenerationRequest([7, 8], ExpertWeights({"new": 1.0}), 5),
            GenerationRequest([7, 8], ExpertWeights({"warm": 1.0}), 5),
        ]
        running.batcher.submit(waiting)
        assert not added.done()
        go.set()
        assert added.result(DEADLINE) == "new"
        assert isinstance(failed.exception(DEADLINE), ZeroDivisionError)
        assert states == [(0, True)]
        running.delivered.wait_for(waiting)
        forwards.__exit__()
        check_alone(changing, running, waiting)
        assert running.batcher.run_when_idle(lambda: 4).result(DEADLINE) == 4  # while the batcher is idle


def test_a_request_whose_expert_was_removed_fails_alone(changing: SoupModel) -> None:
    with RunningBatcher(changing) as running:
        first = GenerationRequest([7, 8, 9], ExpertWeights({"cold": 1.0}), 20, ignore_eos=True)
        forwards, go = _submit_and_hold(changing, running, first)
        removed = running.batcher.run_when_idle(lambda: changing.experts.remove("warm"))
        requests = _requests(6, seed=21)
        for request in requests:
            request.weights = ExpertWeights({"cold": 0.5})
        requests[1].weights = requests[4].weights = ExpertWeights({"warm": 1.0})
        running.batcher.submit(requests)
        go.set()
        running.delivered.wait_for(requests)
        removed.result(DEADLINE)
        forwards.__exit__()
        for request in (requests[1], requests[4]):
            (piece,) = running.delivered.pieces[request]
            assert isinstance(piece.error, DeclarationError)
        check_alone(changing, running, [request for request in requests if "warm" not in request.weights.weights])


def test_a_running_row_whose_expert_was_removed_fails_alone(changing: SoupModel) -> None:
    requests = [
        GenerationRequest([7, 8, 9], ExpertWeights({name: 1.0}), 20, ignore_eos=True)
        for name in ("cold", "warm", "plain")
    ]
    with RunningBatcher(changing) as running:

        def remove_expert(pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
            if (
                "warm" in changing.experts
            ):  # between the first tokens and their step, by the thread that holds the model
                running.batcher._scheduler.batch.release()
                changing.experts.remove("warm")

        running.delivered.on_pieces = remove_expert
        running.answer(requests)
        running.delivered.check_ended_once(requests[1])
        assert isinstance(running.delivered.pieces[requests[1]][-1].error, DeclarationError)
        for request in (requests[0], requests[2]):
            running.delivered.check_ended_once(request)
            assert running.delivered.tokens(request) == greedy(changing, request)


# The end.


def test_closing_finishes_accepted_requests(soup: SoupModel) -> None:
    requests = _requests(9, seed=22)
    running = RunningBatcher(soup, Limits(max_rows=2, read_tokens=8))
    running.batcher.submit(requests)
    job = running.batcher.run_when_idle(lambda: 5)
    assert running.batcher.close(timeout=DEADLINE)
    assert job.result(0) == 5
    check_alone(soup, running, requests)
    assert not running.batcher.is_alive
    with pytest.raises(ClosedError):
        running.batcher.submit(requests)
    with pytest.raises(ClosedError):
        running.batcher.run_when_idle(lambda: 5).result(0)
    running.batcher.abort(requests)
    assert running.batcher.close(timeout=DEADLINE)


def test_closing_can_cut_off_accepted_requests(soup: SoupModel) -> None:
    requests = _requests(9, seed=23)
    for request in requests:
        request.ignore_eos, request.max_new_tokens = True, LONG
    running = RunningBatcher(soup, Limits(max_rows=4))
    forwards, go = _submit_and_hold(soup, running, requests[0])
    running.batcher.submit(requests[1:])
    job: Future[int] = running.batcher.run_when_idle(lambda: 5)
    cancelled: Future[int] = running.batcher.run_when_idle(lambda: 6)
    cancelled.cancel()
    assert not running.batcher.close(finish=False, timeout=0.01)
    go.set()
    assert running.batcher.close(finish=False, timeout=DEADLINE)
    forwards.__exit__()
    assert isinstance(job.exception(0), ClosedError)
    for request in requests:
        running.delivered.check_ended_once(request)
        assert isinstance(running.delivered.pieces[request][-1].error, ClosedError)


def test_the_batchers_own_thread_may_close_it(soup: SoupModel) -> None:
    requests = _requests(2, seed=24)

    def close(_: object) -> None:
        running.batcher.close()

    with RunningBatcher(soup) as running:
        running.delivered.on_pieces = close
        running.answer(requests)
        check_alone(soup, running, requests)


def test_a_model_without_slots_is_rejected(tokenizer: Any) -> None:
    model = small_model("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UsageError, match="linear_attention"):
        Batcher(SoupModel(model, [], tokenizer=tokenizer), lambda _: None)


# Many clients.


def test_many_threads_submit_and_abort_and_run_jobs_at_once(changing: SoupModel) -> None:
    answered: list[GenerationRequest] = []
    jobs: list[Future[int]] = []
    errors: list[BaseException] = []

    def submit_all(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(6):
                requests = [some_request(chance, most=8, longest=16) for _ in range(chance.randint(1, 3))]
                running.batcher.submit(requests)
                if chance.random() < 0.3:
                    time.sleep(chance.random() * 0.01)  # any delay is right
                    running.batcher.abort(requests)
                else:
                    answered.extend(requests)
                if chance.random() < 0.2:
                    jobs.append(running.batcher.run_when_idle(lambda: len(changing.experts)))
                assert running.batcher.load.waiting >= 0
        except BaseException as error:
            errors.append(error)

    with RunningBatcher(changing, Limits(max_rows=8, read_tokens=32, cache_bytes=16 * 64 * 512)) as running:
        threads = [threading.Thread(target=submit_all, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        running.delivered.wait_for(answered)
        assert [job.result(DEADLINE) for job in jobs] == [3] * len(jobs)
    assert jobs
    check_alone(changing, running, answered)


def test_prompts_that_arrive_one_by_one_are_read_together(soup: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "_GATHER_SECONDS", DEADLINE)
    requests = _requests(6)
    gathering, submitted = threading.Event(), threading.Event()
    with RunningBatcher(soup) as running, Forwards(soup) as forwards:
        condition = running.batcher._queue.lock
        wait = condition.wait

        def wait_for_all(timeout: float | None = None) -> bool:
            is_notified = wait(timeout)
            while timeout == queue_module._QUIET_SECONDS and not submitted.is_set():
                gathering.set()
                wait(0.01)
            return is_notified

        monkeypatch.setattr(condition, "wait", wait_for_all)
        running.batcher.submit(requests[:1])
        assert gathering.wait(DEADLINE)
        for request in requests[1:]:
            running.batcher.submit([request])
        submitted.set()
        running.delivered.wait_for(requests)
        assert forwards.shapes[0][0] == len(requests)
