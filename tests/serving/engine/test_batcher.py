"""The batcher: what is asked is answered, once, as it would be alone, whatever becomes of the others."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
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
    Forwards,
    RunningBatcher,
    check_alone,
    greedy,
    small_model,
    small_soup,
    some_ask,
    some_row,
)

LONG = 60  # tokens of an answer that is not over soon


@pytest.fixture(scope="module")
def tokenizer(small_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_base)


@pytest.fixture(scope="module")
def soup(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> SoupModel:
    return small_soup(tmp_path_factory.mktemp("llama"), tokenizer=tokenizer)


@pytest.fixture
def changing(tmp_path: Path, tokenizer: Any) -> SoupModel:
    """Return a model whose experts a test may change."""
    return small_soup(tmp_path / "experts", tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.CRITICAL, "personalized_soups.serving.engine")
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "batcher"]


def _asks(count: int, seed: int = 0, **options: Any) -> list[GenerationRequest]:
    chance = random.Random(seed)
    return [some_ask(chance, **options) for _ in range(count)]


def _held(soup: SoupModel, running: RunningBatcher, ask: GenerationRequest) -> tuple[Forwards, threading.Event]:
    """Submit an ask, and let the batcher wait in its first step until the event is set."""
    forwards, go = Forwards(soup), threading.Event()
    reached = threading.Event()

    def wait(number: int) -> None:
        if number >= 1:
            reached.set()
            assert go.wait(30)

    forwards.before = wait
    running.batcher.submit([ask])
    assert reached.wait(30)
    return forwards, go


# Answers.


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), read=st.sampled_from([4, 9, 4096]), rows=st.sampled_from([1, 3, 64]))
def test_answers_are_those_of_each_alone_whenever_they_come(soup: SoupModel, seed: int, read: int, rows: int) -> None:
    chance = random.Random(seed)
    asks = [some_ask(chance, most=10, longest=24) for _ in range(9)]
    with RunningBatcher(soup, Limits(read_tokens=read, max_rows=rows)) as running:
        rest = list(asks)
        while rest:
            count = chance.randint(1, 3)
            running.batcher.submit(rest[:count])
            rest = rest[count:]
            time.sleep(chance.random() * 0.01)
        running.heard.wait_for(asks)
        check_alone(soup, running, asks)


def test_draws_are_those_of_generate(soup: SoupModel) -> None:
    prompts = ["wash the kettle", "rub", "dry it with a clean towel", "old"]
    weights = [some_row(random.Random(place)) for place in range(4)]
    want = soup.generate(prompts, weights, temperature=0.9, seed=5, max_new_tokens=12)
    asks = [
        GenerationRequest(soup.generator.encoded(prompt), row, 12, SamplingParams(temperature=0.9, seed=5, place=place))
        for place, (prompt, row) in enumerate(zip(prompts, weights, strict=True))
    ]
    with RunningBatcher(soup) as running:
        running.answer(asks[:1])
        running.answer(asks[1:][::-1])
        assert [running.heard.text(ask).strip() for ask in asks] == want


def test_stop_strings_end_tokens_and_lengths_end_an_answer(soup: SoupModel, tokenizer: Any) -> None:
    plain = GenerationRequest(list(range(60, 70)), ExpertWeights({"warm": 1.0}), 30, ignore_eos=True)
    with RunningBatcher(soup) as running:
        running.answer([plain])
        tokens = running.heard.tokens(plain)
        assert len(tokens) == 30
        assert running.heard.pieces[plain][-1].finish == Finish.LENGTH
        whole = running.heard.text(plain)
        stop = whole[len(whole) // 2 :][:3]
        stopped = GenerationRequest(plain.tokens, plain.weights, 30, stops=[stop], ignore_eos=True)
        unheard = GenerationRequest(plain.tokens, plain.weights, 30, stops=["never said"], ignore_eos=True)
        one = GenerationRequest(plain.tokens, plain.weights, 1, ignore_eos=True)
        running.answer([stopped, unheard, one])
        assert running.heard.text(stopped) == whole[: whole.index(stop)]
        assert running.heard.pieces[stopped][-1].finish == Finish.STOP
        assert len(running.heard.tokens(stopped)) < 30
        assert running.heard.text(unheard) == whole
        assert running.heard.tokens(one) == tokens[:1]
        # an end token is chosen where a bias has it so
        ended = GenerationRequest(plain.tokens, plain.weights, 30, SamplingParams(logit_bias={1: 100.0}, logprobs=1))
        going = GenerationRequest(
            plain.tokens, plain.weights, 30, SamplingParams(logit_bias={1: 100.0}), ignore_eos=True
        )
        running.answer([ended, going])
        (piece,) = running.heard.pieces[ended]
        assert (piece.token, piece.text, piece.finish) == (1, "", Finish.STOP)
        assert piece.logprobs is not None
        assert running.heard.tokens(going) == [1] * 30
        assert running.heard.text(going) == ""


# Passes, places, memory.


def test_prompts_are_read_together_and_rows_step_together(soup: SoupModel) -> None:
    asks = _asks(8, most=1)
    for ask in asks:
        ask.max_new_tokens, ask.ignore_eos = 5, True
    steps: list[int] = []
    with RunningBatcher(soup, on_step=lambda rows, seconds: steps.append(rows)) as running, Forwards(soup) as forwards:
        running.answer(asks)
    assert forwards.shapes == [(8, max(len(ask.tokens) for ask in asks)), *[(8, 1)] * 4]
    assert steps == [8] * 4


def test_no_more_tokens_are_read_at_once_than_may(soup: SoupModel) -> None:
    first = GenerationRequest(list(range(6, 16)), ExpertWeights(), LONG, ignore_eos=True)
    asks = [
        GenerationRequest(list(range(6, 6 + count)), ExpertWeights(), 2, ignore_eos=True)
        for count in (7, 7, 7, 3, 50, 4)
    ]
    with RunningBatcher(soup, Limits(read_tokens=20)) as running:
        forwards, go = _held(soup, running, first)
        with forwards:
            running.batcher.submit(asks)
            go.set()
            running.heard.wait_for(asks)
        reads = [shape for shape in forwards.shapes[1:] if shape[1] > 1]
    assert reads == [(2, 7), (2, 7), (1, 20), (1, 20), (1, 10), (1, 4)]
    # and those that run have a step in between
    places = [place for place, shape in enumerate(forwards.shapes) if shape[1] > 1]
    assert all(after > before + 1 for before, after in pairwise(places))


def test_what_is_asked_first_is_begun_first(soup: SoupModel) -> None:
    asks = _asks(20, seed=3, most=6)
    with RunningBatcher(soup, Limits(max_rows=3)) as running:
        running.answer(asks)
        assert list(running.heard.pieces) == asks  # in the order of their first pieces


def test_no_more_rows_run_than_may(soup: SoupModel) -> None:
    asks = _asks(12, seed=4, most=6)
    with RunningBatcher(soup, Limits(max_rows=3)) as running, Forwards(soup) as forwards:
        running.answer(asks)
    assert max(rows for rows, _ in forwards.shapes) == 3


@pytest.mark.parametrize("read", [16, 4096])
def test_no_more_bytes_are_held_than_may_unless_one_alone_needs_them(soup: SoupModel, read: int) -> None:
    token_bytes = 512
    limit = 4 * 64 * token_bytes
    chance = random.Random(2)
    asks = [some_ask(chance, most=9, longest=20) for _ in range(12)]
    asks.insert(3, GenerationRequest(list(range(6, 206)), ExpertWeights({"warm": 0.5}), 5))  # within the limit alone
    asks.insert(
        8, GenerationRequest([7 + place % 300 for place in range(240)], ExpertWeights(), 16)
    )  # beyond it, alone
    held: list[tuple[int, int]] = []
    with (
        RunningBatcher(soup, Limits(cache_bytes=limit, read_tokens=read, max_context=512)) as running,
        Forwards(soup) as forwards,
    ):
        # before each pass, and so after all room is made but for the very first
        forwards.before = lambda _: held.append((running.batcher.load.cache_bytes, running.batcher.load.running))
        running.answer(asks)
    check_alone(soup, running, asks)
    beyond = [rows for size, rows in held if size > limit]
    assert beyond == [1] * len(beyond)
    assert beyond  # the long one
    assert max(rows for _, rows in held) >= 3
    # what the long one needed is let go once more fits
    assert held[-1][0] <= limit


def test_memory_is_let_go_when_nobody_has_been_answered_for_a_while(
    soup: SoupModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "_IDLE_SECONDS", 0.5)
    with RunningBatcher(soup) as running:
        running.answer(_asks(3))
        assert running.batcher.load.cache_bytes > 0
        _until(lambda: running.batcher.load.cache_bytes == 0)
        assert running.batcher.load.running == running.batcher.load.waiting == 0


def _until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# The queue.


def test_too_many_are_refused_together_and_those_before_are_answered(soup: SoupModel) -> None:
    with RunningBatcher(soup, Limits(max_rows=1, max_waiting=3)) as running:
        first, *asks = _asks(6, seed=5)
        forwards, go = _held(soup, running, GenerationRequest(first.tokens, first.weights, LONG, ignore_eos=True))
        running.batcher.submit(asks[:2])
        with pytest.raises(QueueFullError) as caught:
            running.batcher.submit(asks[2:4])
        assert "2 are waiting" in caught.value.what
        assert running.batcher.load.waiting == 2
        assert running.batcher.load.running == 1
        running.batcher.submit(asks[2:3])  # one has a place
        with pytest.raises(QueueFullError):
            running.batcher.submit(asks[3:4])
        go.set()
        running.heard.wait_for(asks[:3])
        forwards.__exit__()
        check_alone(soup, running, asks[:3])
        assert not running.heard.pieces.keys() & set(asks[3:])


def test_when_to_come_back(soup: SoupModel) -> None:
    with RunningBatcher(soup, Limits(max_rows=2, max_waiting=500)) as running:
        assert running.batcher.retry_after() == 1
        assert running.batcher.load.seconds_per_answer == 0
        asks = _asks(1)
        running.answer(asks)
        assert 0 < running.batcher.load.seconds_per_answer < 30
        running.batcher._scheduler.seconds_per_answer = 4.0
        forwards, go = _held(soup, running, GenerationRequest([7, 8], ExpertWeights(), LONG, ignore_eos=True))
        waiting = _asks(9, seed=6)
        running.batcher.submit(waiting)
        assert running.batcher.retry_after() == 18  # nine wait for two places of four seconds
        running.batcher._scheduler.seconds_per_answer = 1e9
        assert running.batcher.retry_after() == 60
        running.batcher.abort(waiting)
        go.set()
        forwards.__exit__()


@pytest.mark.parametrize(
    ("ask", "said"),
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
def test_what_would_fail_in_everybodys_step_is_refused(
    soup: SoupModel, ask: GenerationRequest, said: str | None
) -> None:
    fine = _asks(1)
    with RunningBatcher(soup, Limits(max_context=512 if said else 100)) as running:
        with pytest.raises(InputError, match=said):
            running.batcher.submit([*fine, ask])
        running.answer(fine)
        assert set(running.heard.pieces) == set(fine)


def test_the_limits_are_those_of_the_model(soup: SoupModel) -> None:
    with RunningBatcher(soup) as running:
        assert running.batcher.limits == Limits(max_context=256)
    for name in ("max_rows", "max_context", "read_tokens"):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: 0})


def test_weights_that_follow_the_tokens_are_refused(soup: SoupModel) -> None:
    with RunningBatcher(soup) as running, pytest.raises(UsageError, match="number of the generated token"):
        running.batcher.submit([GenerationRequest([7], ExpertWeights({"warm": lambda step: 0.5}), 3)])


def test_a_context_beyond_which_rows_would_turn_each_other_is_not_taken() -> None:
    from transformers import LlamaConfig, Phi3Config

    assert max_context_of(LlamaConfig(max_position_embeddings=300)) == 300
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    config = Phi3Config(**sizes, max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope)
    assert max_context_of(config) == 64


# Giving up.


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_who_gives_up_frees_a_place_and_harms_nobody(soup: SoupModel, seed: int) -> None:
    chance = random.Random(seed)
    asks = [some_ask(chance, most=25, longest=24) for _ in range(14)]
    with RunningBatcher(soup, Limits(max_rows=4, read_tokens=8)) as running:
        running.batcher.submit(asks)
        gone: set[GenerationRequest] = set()
        for _ in range(6):
            time.sleep(chance.random() * 0.01)
            some = chance.sample(asks, 2)
            gone.update(some)
            running.batcher.abort(some)
        kept = [ask for ask in asks if ask not in gone]
        running.heard.wait_for(kept)
        check_alone(soup, running, kept)
        for ask in gone & running.heard.pieces.keys():  # as far as they came
            assert greedy(soup, ask)[: len(running.heard.tokens(ask))] == running.heard.tokens(ask)
        _until(lambda: running.batcher.load.running == running.batcher.load.waiting == 0)


def test_who_gives_up_while_waiting_reading_or_running_is_let_go(soup: SoupModel) -> None:
    ran = GenerationRequest([7, 8, 9], ExpertWeights(), LONG, ignore_eos=True)
    read = GenerationRequest([7] * 100, ExpertWeights(), 2)
    waited, kept = _asks(2, seed=7)
    with RunningBatcher(soup, Limits(read_tokens=10, max_rows=2)) as running:
        forwards, go = _held(soup, running, ran)
        running.batcher.submit([read, waited, kept])
        passed = threading.Event()

        def look(_: int) -> None:
            if forwards.shapes[-1] == (1, 10) and len(forwards.shapes) > 6:
                running.batcher.abort([read, ran, waited])
                forwards.before = lambda _: None
                passed.set()

        forwards.before = look
        go.set()
        assert passed.wait(30)
        running.heard.wait_for([kept])
        forwards.__exit__()
        check_alone(soup, running, [kept])
        assert read not in running.heard.pieces
        assert waited not in running.heard.pieces
        assert not running.heard.is_done(ran)
        assert sum(shape == (1, 10) for shape in forwards.shapes) < 10  # the prompt was not read to its end


def test_what_is_aborted_and_not_there_does_not_pile_up(soup: SoupModel) -> None:
    with RunningBatcher(soup) as running:
        done = _asks(3)
        running.answer(done)
        running.batcher.abort([*done, *_asks(1000, seed=8)])
        _until(lambda: not running.batcher._queue._aborted)
        running.answer(_asks(1, seed=9))
        running.answer(done_again := _asks(3))
        check_alone(soup, running, done_again)


# Faults.


def test_a_fault_of_a_step_ends_those_that_run_and_no_others(soup: SoupModel) -> None:
    asks = _asks(3, seed=10)
    for ask in asks:
        ask.ignore_eos, ask.max_new_tokens = True, 9
    later = _asks(2, seed=11)
    with RunningBatcher(soup, Limits(max_rows=3)) as running:

        def fail(number: int) -> None:
            if number == 3:
                raise RuntimeError("a kernel failed")

        with Forwards(soup) as forwards:
            forwards.before = fail
            running.answer([*asks, *later])
        for ask in asks:
            running.heard.check_ended_once(ask)
            fault = running.heard.pieces[ask][-1].error
            assert isinstance(fault, RuntimeError)
            assert fault.__traceback__ is None  # it would hold tensors
            assert len(running.heard.tokens(ask)) == 3
        check_alone(soup, running, later)
        assert running.batcher.is_alive


def test_prompts_for_which_memory_is_lacking_are_read_fewer_at_a_time(soup: SoupModel) -> None:
    asks = _asks(9, seed=12)
    with RunningBatcher(soup) as running, Forwards(soup) as forwards:

        def fail(_: int) -> None:
            rows, width = forwards.shapes[-1]
            if width > 1 and rows > 2:
                raise torch.OutOfMemoryError("no more")

        for ask in asks:
            ask.tokens = [*ask.tokens, 7]
        forwards.before = fail
        running.answer(asks)
        check_alone(soup, running, asks)
        assert list(running.heard.pieces) == asks


def test_a_prompt_that_fails_alone_ends_alone(soup: SoupModel) -> None:
    asks = _asks(7, seed=13)
    asks[3].tokens = [300, 301]
    with RunningBatcher(soup) as running:

        def fail(module: Any, arguments: Any, keywords: Any) -> None:
            if 301 in keywords["input_ids"][:, -1].tolist() and 300 in keywords["input_ids"].flatten().tolist():
                raise IndexError("an ill prompt")

        handle = soup.model.register_forward_pre_hook(fail, with_kwargs=True)
        running.answer(asks)
        handle.remove()
        running.heard.check_ended_once(asks[3])
        (piece,) = running.heard.pieces[asks[3]]
        assert isinstance(piece.error, IndexError)
        check_alone(soup, running, asks[:3] + asks[4:])


def test_a_fault_at_any_time_leaves_nobody_waiting(soup: SoupModel) -> None:
    chance = random.Random(14)
    asks = [some_ask(chance, most=10, longest=30) for _ in range(40)]
    with RunningBatcher(soup, Limits(max_rows=4, read_tokens=12)) as running, Forwards(soup) as forwards:

        def fail(_: int) -> None:
            if chance.random() < 0.1:
                raise chance.choice([RuntimeError, torch.OutOfMemoryError, KeyError, UsageError])(*"abc")

        forwards.before = fail
        running.answer(asks)
    fine = [ask for ask in asks if running.heard.pieces[ask][-1].error is None]
    assert 0 < len(fine) < len(asks)
    for ask in asks:
        running.heard.check_ended_once(ask)
    check_alone(soup, running, fine)


def test_an_answer_whose_text_fails_ends_alone(soup: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = _asks(4, seed=15)

    class Ill(Detokenizer):
        def add(self, token: int) -> str:
            if self._stops:
                raise ValueError("an ill text")
            return super().add(token)

    monkeypatch.setattr("personalized_soups.serving.engine.scheduler.Detokenizer", Ill)
    asks[1].stops = ["x"]
    with RunningBatcher(soup) as running:
        running.answer(asks)
        running.heard.check_ended_once(asks[1])
        assert isinstance(running.heard.pieces[asks[1]][-1].error, ValueError)
        check_alone(soup, running, [asks[0], *asks[2:]])


def test_a_soup_of_which_nothing_comes_is_told_of(soup: SoupModel) -> None:
    asks = _asks(4, seed=16)
    asks[2].tokens, asks[2].max_new_tokens = [7] * 40, 5

    def ill(module: Any, arguments: Any, keywords: Any, output: Any) -> Any:
        output.logits[keywords["input_ids"][:, -3:].eq(7).all(1) & (keywords["input_ids"].shape[1] > 3)] = torch.nan
        return output

    with RunningBatcher(soup) as running:
        handle = soup.model.register_forward_hook(ill, with_kwargs=True)
        running.answer(asks)
        handle.remove()
        (piece,) = running.heard.pieces[asks[2]]
        assert isinstance(piece.error, RunError)
        assert "smaller weights" in piece.error.mend
        check_alone(soup, running, [*asks[:2], asks[3]])


def test_a_listener_that_fails_loses_its_own_pieces_only(soup: SoupModel) -> None:
    asks = _asks(5, seed=17)
    for ask in asks:
        ask.ignore_eos, ask.max_new_tokens = True, 30
    ill = asks[2]
    with RunningBatcher(soup) as running:

        def fail(pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
            if any(ask is ill for ask, _ in pieces):
                raise OSError("nobody listens")

        running.heard.on_pieces = fail
        fine = [ask for ask in asks if ask is not ill]
        running.batcher.submit(asks)
        running.heard.wait_for(fine)
        running.heard.on_pieces = lambda _: None
        for ask in fine:
            running.heard.check_ended_once(ask)
            assert len(running.heard.tokens(ask)) == 30
        assert ill not in running.heard.pieces  # it was given up
        _until(lambda: running.batcher.load.running == 0)
        running.answer(later := _asks(2, seed=18))
        check_alone(soup, running, later)


def test_one_who_counts_steps_and_fails_harms_nobody(soup: SoupModel) -> None:
    asks = _asks(3, seed=19)

    def fail(rows: int, seconds: float) -> None:
        raise ZeroDivisionError

    with RunningBatcher(soup, on_step=fail) as running:
        running.answer(asks)
        check_alone(soup, running, asks)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_against_all_expectation_leaves_nobody_waiting(soup: SoupModel) -> None:
    asks = _asks(4, seed=20, most=9)
    with RunningBatcher(soup, Limits(max_rows=2)) as running, Forwards(soup) as forwards:

        def fail(number: int) -> None:
            if number == 2:
                raise SystemExit

        for ask in asks:
            ask.ignore_eos, ask.max_new_tokens = True, 9
        forwards.before = fail
        running.answer(asks)
        for ask in asks:
            running.heard.check_ended_once(ask)
            assert isinstance(running.heard.pieces[ask][-1].error, ClosedError)
        assert not running.batcher.is_alive
        with pytest.raises(ClosedError):
            running.batcher.submit(asks)


# Experts that change.


def test_jobs_are_done_when_nothing_runs_and_waiting_ones_go_on_afterwards(changing: SoupModel, tmp_path: Path) -> None:
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in changing.layers.by_name.items()}
    new = write_expert(tmp_path / "more" / "new", seed=9, rank=2, alpha=2, shapes=shapes, base=None)
    with RunningBatcher(changing, Limits(max_rows=2)) as running:
        first = GenerationRequest([7, 8, 9], ExpertWeights({"warm": 1.0}), 20, ignore_eos=True)
        forwards, go = _held(changing, running, first)
        states: list[tuple[int, bool]] = []

        def add() -> str:
            states.append((running.batcher.load.running, running.heard.is_done(first)))
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
        assert added.result(30) == "new"
        assert isinstance(failed.exception(30), ZeroDivisionError)
        assert states == [(0, True)]
        running.heard.wait_for(waiting)
        forwards.__exit__()
        check_alone(changing, running, waiting)
        assert running.batcher.run_when_idle(lambda: 4).result(30) == 4  # of an idle one


def test_an_ask_whose_expert_is_gone_fails_alone(changing: SoupModel) -> None:
    with RunningBatcher(changing) as running:
        first = GenerationRequest([7, 8, 9], ExpertWeights({"cold": 1.0}), 20, ignore_eos=True)
        forwards, go = _held(changing, running, first)
        removed = running.batcher.run_when_idle(lambda: changing.experts.remove("warm"))
        asks = _asks(6, seed=21)
        for ask in asks:
            ask.weights = ExpertWeights({"cold": 0.5})
        asks[1].weights = asks[4].weights = ExpertWeights({"warm": 1.0})
        running.batcher.submit(asks)
        go.set()
        running.heard.wait_for(asks)
        removed.result(30)
        forwards.__exit__()
        for ask in (asks[1], asks[4]):
            (piece,) = running.heard.pieces[ask]
            assert isinstance(piece.error, DeclarationError)
        check_alone(changing, running, [ask for ask in asks if "warm" not in ask.weights.weights])


def test_a_running_row_whose_expert_is_taken_away_fails_alone(changing: SoupModel) -> None:
    asks = [
        GenerationRequest([7, 8, 9], ExpertWeights({name: 1.0}), 20, ignore_eos=True)
        for name in ("cold", "warm", "plain")
    ]
    with RunningBatcher(changing) as running:

        def take_away(pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
            if (
                "warm" in changing.experts
            ):  # between the first tokens and their step, by the thread that holds the model
                running.batcher._scheduler.batch.release()
                changing.experts.remove("warm")

        running.heard.on_pieces = take_away
        running.answer(asks)
        running.heard.check_ended_once(asks[1])
        assert isinstance(running.heard.pieces[asks[1]][-1].error, DeclarationError)
        for ask in (asks[0], asks[2]):
            running.heard.check_ended_once(ask)
            assert running.heard.tokens(ask) == greedy(changing, ask)


# The end.


def test_what_was_taken_is_finished(soup: SoupModel) -> None:
    asks = _asks(9, seed=22)
    running = RunningBatcher(soup, Limits(max_rows=2, read_tokens=8))
    running.batcher.submit(asks)
    job = running.batcher.run_when_idle(lambda: 5)
    assert running.batcher.close(timeout=30)
    assert job.result(0) == 5
    check_alone(soup, running, asks)
    assert not running.batcher.is_alive
    with pytest.raises(ClosedError):
        running.batcher.submit(asks)
    with pytest.raises(ClosedError):
        running.batcher.run_when_idle(lambda: 5).result(0)
    running.batcher.abort(asks)
    assert running.batcher.close(timeout=30)


def test_what_was_taken_is_cut_off(soup: SoupModel) -> None:
    asks = _asks(9, seed=23)
    for ask in asks:
        ask.ignore_eos, ask.max_new_tokens = True, LONG
    running = RunningBatcher(soup, Limits(max_rows=4))
    forwards, go = _held(soup, running, asks[0])
    running.batcher.submit(asks[1:])
    job: Future[int] = running.batcher.run_when_idle(lambda: 5)
    cancelled: Future[int] = running.batcher.run_when_idle(lambda: 6)
    cancelled.cancel()
    assert not running.batcher.close(finish=False, timeout=0.01)
    go.set()
    assert running.batcher.close(finish=False, timeout=30)
    forwards.__exit__()
    assert isinstance(job.exception(0), ClosedError)
    for ask in asks:
        running.heard.check_ended_once(ask)
        assert isinstance(running.heard.pieces[ask][-1].error, ClosedError)


def test_it_may_be_closed_by_its_own_thread(soup: SoupModel) -> None:
    asks = _asks(2, seed=24)

    def close(_: object) -> None:
        running.batcher.close()

    with RunningBatcher(soup) as running:
        running.heard.on_pieces = close
        running.answer(asks)
        check_alone(soup, running, asks)


def test_a_batcher_refuses_a_model_without_slots(tokenizer: Any) -> None:
    model = small_model("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UsageError, match="linear_attention"):
        Batcher(SoupModel(model, [], tokenizer=tokenizer), lambda _: None)


# Many at once.


def test_many_threads_ask_and_give_up_and_change_experts_at_once(changing: SoupModel) -> None:
    answered: list[GenerationRequest] = []
    gone: list[GenerationRequest] = []
    jobs: list[Future[int]] = []
    faults: list[BaseException] = []

    def ask_on(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(6):
                asks = [some_ask(chance, most=8, longest=16) for _ in range(chance.randint(1, 3))]
                running.batcher.submit(asks)
                if chance.random() < 0.3:
                    time.sleep(chance.random() * 0.01)
                    running.batcher.abort(asks)
                    gone.extend(asks)
                else:
                    answered.extend(asks)
                if chance.random() < 0.2:
                    jobs.append(running.batcher.run_when_idle(lambda: len(changing.experts)))
                assert running.batcher.load.waiting >= 0
        except BaseException as fault:
            faults.append(fault)

    with RunningBatcher(changing, Limits(max_rows=8, read_tokens=32, cache_bytes=16 * 64 * 512)) as running:
        threads = [threading.Thread(target=ask_on, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        running.heard.wait_for(answered, seconds=60)
        assert [job.result(30) for job in jobs] == [3] * len(jobs)
    assert jobs
    check_alone(changing, running, answered)


def test_a_crowds_prompts_are_read_together_though_they_come_one_by_one(
    soup: SoupModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "_QUIET_SECONDS", 0.3)
    monkeypatch.setattr(queue_module, "_GATHER_SECONDS", 10.0)
    asks = _asks(6)
    with RunningBatcher(soup) as running, Forwards(soup) as forwards:
        for ask in asks:
            running.batcher.submit([ask])
            time.sleep(0.01)
        running.heard.wait_for(asks)
        assert forwards.shapes[0][0] == len(asks)
