"""A running batch: every row gets the answer that it gets alone, regardless of the rows that join and leave."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personalized_soups import SoupModel
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.serving.engine.batch import Batch, BatchRow
from personalized_soups.serving.engine.request import GenerationRequest
from personalized_soups.serving.engine.token_sampler import SamplingParams, TokenSampler
from tests.serving.engine.worlds import BASES, Forwards, greedy, small_soup, some_request, true_logits


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Enter inference mode, as the batcher's thread does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SoupModel:
    return small_soup(tmp_path_factory.mktemp("llama"))


def _row(request: GenerationRequest) -> BatchRow:
    return BatchRow(list(request.tokens), request.weights, TokenSampler(request.sampling_params))


def _answer(
    model: SoupModel, requests: Sequence[GenerationRequest], random: random.Random, *, most: int = 7
) -> dict[GenerationRequest, list[int]]:
    """Answer requests in one batch, which they join and leave at random times; some answers are cut off."""
    batch = Batch(model)
    waiting, running, answers = (
        list(requests),
        dict[BatchRow, GenerationRequest](),
        dict[GenerationRequest, list[int]](),
    )

    def leave(rows: list[BatchRow]) -> None:
        batch.remove(rows)
        for row in rows:
            request = running.pop(row)
            answers[request] = row.tokens[len(request.tokens) :]

    def is_done(row: BatchRow) -> bool:
        return len(row.tokens) - len(running[row].tokens) >= running[row].max_new_tokens

    while waiting or running:
        if waiting and random.random() < 0.5:
            group, waiting = (waiting[:1], waiting[1:]) if random.random() < 0.5 else (waiting[:3], waiting[3:])
            rows = [_row(request) for request in group]
            parts = most if len(rows) == 1 else 99  # several prompts must be read in one call
            while batch.read(rows, parts) is None:
                if batch.rows:  # the other rows continue and leave meanwhile
                    batch.step()
                    leave([row for row in batch.rows if is_done(row) or random.random() < 0.2])
            running.update(zip(rows, group, strict=True))
        leave([row for row in batch.rows if is_done(row) or random.random() < 0.02])
        if batch.rows:
            batch.step()
    batch.clear()
    return answers


def _check_alone(model: SoupModel, answers: dict[GenerationRequest, list[int]], *, tolerance: float) -> None:
    """Compare answers with those of transformers' generate; they may differ where two tokens are equally likely."""
    assert sum(map(len, answers.values())) > len(answers)
    for request, got in answers.items():
        want = greedy(model, request)[: len(got)]
        got = got[: len(want)]  # generate stops at an end token  # noqa: PLW2901
        first_difference = next(
            (place for place, pair in enumerate(zip(got, want, strict=True)) if len(set(pair)) > 1), None
        )
        if first_difference is not None:
            logits_V = true_logits(model, request.weights, [*request.tokens, *want[:first_difference]])[-1]
            assert float(logits_V[want[first_difference]] - logits_V[got[first_difference]]) < tolerance


@pytest.mark.parametrize("name", [name for name in BASES if name not in {"gemma2", "gpt_oss"}])
def test_answers_are_those_of_each_row_alone(tmp_path: Path, name: str) -> None:
    model = small_soup(tmp_path, name)
    chance = random.Random(name)
    requests = [some_request(chance, most=12, longest=20) for _ in range(8)]
    answers = _answer(model, requests, chance)
    assert answers.keys() == set(requests)
    _check_alone(model, answers, tolerance=1e-9)  # float64: see test_kv_slots


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_answers_in_float32_differ_only_where_tokens_are_equally_likely(tmp_path: Path, name: str) -> None:
    model = small_soup(tmp_path, name, attention="eager", dtype=torch.float32)
    chance = random.Random(name)
    requests = [some_request(chance, most=12, longest=20) for _ in range(8)]
    # sums of up to 1000 terms below 10: each of two logits is off by at most as many roundings
    _check_alone(model, _answer(model, requests, chance), tolerance=2 * 1000 * 10 * 1.2e-7)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_answers_are_those_of_each_row_alone_in_any_order(llama: SoupModel, seed: int) -> None:
    chance = random.Random(seed)
    requests = [some_request(chance, most=8, longest=20) for _ in range(7)]
    _check_alone(llama, _answer(llama, requests, chance), tolerance=1e-9)


def test_a_prompt_read_in_parts_keeps_them_while_other_rows_leave(llama: SoupModel) -> None:
    batch = Batch(llama)
    chance = random.Random(1)
    others = [_row(some_request(chance)) for _ in range(5)]
    batch.read(others, 99)
    request = GenerationRequest(list(range(50, 80)), ExpertWeights({"warm": 0.8}), 6)
    row = _row(request)
    assert batch.read([row], 10) is None
    batch.step()
    batch.remove(others[:3])
    assert batch.read([row], 10) is None
    batch.remove(others[3:])
    assert batch.read([row], 10) is not None
    for _ in range(5):
        batch.step()
    assert row.tokens[30:] == greedy(llama, request)


def test_nan_keys_stay_in_their_row_and_vanish_with_it(llama: SoupModel) -> None:
    batch = Batch(llama)
    ill = _row(GenerationRequest(list(range(50, 80)), ExpertWeights({"warm": 0.8}), 6))
    neighbor = _row(
        GenerationRequest(list(range(50, 90)), ExpertWeights(), 6)
    )  # longer, so that attention covers all columns of the other row
    batch.read([neighbor, ill], 99)
    for layer in batch._slots._layers:  # as large weights make them in float16
        layer.keys[1, :, :30] = torch.nan
        layer.values[1, :, :30] = torch.inf
    assert [choice.is_sound for choice in batch.step()] == [True, False]
    batch.remove([ill])
    request = GenerationRequest([50, 60, 70], ExpertWeights({"warm": 0.8}), 6)
    row = _row(request)  # takes its slot
    batch.read([row], 99)
    for _ in range(5):
        batch.step()
    assert row.tokens[3:] == greedy(llama, request)
    assert neighbor.tokens[40:46] == greedy(llama, GenerationRequest(neighbor.tokens[:40], ExpertWeights(), 6))


def test_a_read_and_a_step_are_one_forward_pass_each(llama: SoupModel) -> None:
    batch = Batch(llama)
    rows = [_row(some_request(random.Random(seed), longest=9)) for seed in range(9)]
    longest = max(len(row.tokens) for row in rows)
    with Forwards(llama) as forwards:
        batch.read(rows, 99)
        batch.step()
        batch.remove(rows[::2])
        batch.step()
    assert forwards.shapes == [(9, longest), (9, 1), (4, 1)]


def test_a_read_that_fails_changes_nothing(llama: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(llama)
    request = GenerationRequest([50, 60, 70], ExpertWeights({"warm": 0.8}), 6)
    row = _row(request)
    batch.read([row], 99)
    with Forwards(llama) as forwards:

        def fail(_: int) -> None:
            raise torch.OutOfMemoryError("no more")

        forwards.before = fail
        with pytest.raises(torch.OutOfMemoryError):
            batch.read([_row(GenerationRequest(list(range(9, 200)), ExpertWeights(), 3))], 999)
    with monkeypatch.context() as patch:
        patch.setattr("personalized_soups.serving.engine.batch.choose", _full)
        with pytest.raises(torch.OutOfMemoryError):
            batch.read([_row(GenerationRequest([7, 8, 9], ExpertWeights(), 3))], 999)
        with pytest.raises(torch.OutOfMemoryError):
            batch.step()  # the step can be repeated
    assert list(batch.rows) == [row]
    for _ in range(5):
        batch.step()
    assert row.tokens[3:] == greedy(llama, request)


def _full(*_: object) -> None:
    raise torch.OutOfMemoryError("no more")


def test_release_and_clear_leave_the_mixture(llama: SoupModel) -> None:
    batch = Batch(llama)
    batch.read([_row(GenerationRequest([7, 8], ExpertWeights({"warm": 1.0}), 3))], 99)
    batch.step()
    is_set = [llama._active.is_set_here]
    batch.release()
    is_set.append(llama._active.is_set_here)
    batch.step()
    batch.clear()
    is_set.append(llama._active.is_set_here)
    assert is_set == [True, False, False]
    assert batch.num_bytes == 0


def test_token_bytes_are_those_allocated(tmp_path: Path) -> None:
    # keys and values of two layers in float64: two heads of eight, or four
    for name, size in (("llama", 512), ("gemma3", 512), ("gpt2", 1024), ("gpt_neox", 1024)):
        model = small_soup(tmp_path / name, name)
        batch = Batch(model)
        batch.read([_row(GenerationRequest([7, 8], ExpertWeights(), 3, SamplingParams()))], 99)
        assert batch.token_bytes == size
        assert batch.num_bytes == 64 * size
