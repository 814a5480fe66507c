from __future__ import annotations

import random

from personalized_soups.training.order import LikeLengthOrder


def _padding(lengths: list[int], order: list[int], batch_size: int) -> float:
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / sum(lengths)


def test_every_index_once_and_batches_of_like_length() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(10, 200) for _ in range(500)]
    order = list(LikeLengthOrder(lengths, batch_size=16, seed=1))
    assert sorted(order) == list(range(500))
    assert _padding(lengths, order, 16) < 1.15
    assert _padding(lengths, rng.sample(range(500), 500), 16) > 1.6


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [(7 * i) % 50 for i in range(100)]
    order = LikeLengthOrder(lengths, batch_size=8, seed=1)
    first = list(order)
    assert list(order) == first
    order.epoch = 1
    second = list(order)
    assert second != first
    again = LikeLengthOrder(lengths, batch_size=8, seed=1)
    again.epoch = 1
    assert list(again) == second
    assert list(LikeLengthOrder(lengths, batch_size=8, seed=2)) != first


def test_batches_come_in_no_order_of_length_and_differ_between_epochs() -> None:
    lengths = list(range(512))
    order = LikeLengthOrder(lengths, batch_size=16, seed=0)
    batches = [frozenset(chunk) for chunk in _chunks(list(order), 16)]
    heads = [min(batch) for batch in batches]
    assert heads != sorted(heads)
    order.epoch = 1
    assert not set(batches) & {frozenset(chunk) for chunk in _chunks(list(order), 16)}


def test_fewer_pairs_than_a_batch() -> None:
    assert sorted(LikeLengthOrder([3, 1, 2], batch_size=16, seed=0)) == [0, 1, 2]


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]
