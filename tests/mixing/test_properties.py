"""Random mixtures, ranks, paddings and batches against float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from personalized_soups import SoupModel
from personalized_soups.methods.factors import Factors
from personalized_soups.mixing.layers import stack as stacks
from personalized_soups.mixing.layers.arithmetic import mixed
from personalized_soups.mixing.layers.stack import Member, Stack
from tests.merging.worlds import examples
from tests.mixing.worlds import LOGITS, float64_model, open_model, relative, write_experts, write_shared

UNIT = 2.0**-24


class Layer(NamedTuple):
    """What a layer's experts look like; those of one basis have one A where their ranks agree."""

    ranks: tuple[int, ...]
    bases: tuple[int, ...]
    scalings: tuple[float, ...]
    gained: tuple[bool, ...]
    biased: tuple[bool, ...]
    shape: tuple[int, int]
    has_bias: bool
    seed: int


class Batch(NamedTuple):
    """The weights of each gate, and how many rows of the input each is for."""

    weights: tuple[tuple[float, ...], ...]
    each: int


WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.5, 1e-3])


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    count = draw(st.integers(1, 4))

    def several(strategy: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return draw(st.tuples(*[strategy] * count))

    return Layer(
        ranks=several(st.integers(1, 4)),
        bases=several(st.integers(0, 1)),
        scalings=several(st.sampled_from([0.5, 2.0, 1.7])),
        gained=several(st.sampled_from([False, False, True])),
        biased=several(st.sampled_from([False, False, True])),
        shape=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        has_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def _members(layer: Layer) -> list[Member]:
    out_features, in_features = layer.shape

    def numbers(*key: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(np.random.default_rng([layer.seed, *key]).normal(size=shape)).float()

    found = []
    for place, (rank, basis, scaling) in enumerate(zip(layer.ranks, layer.bases, layer.scalings, strict=True)):
        factors = Factors(
            numbers(0, basis, shape=(rank, in_features)), numbers(1, place, shape=(out_features, rank)), scaling
        )
        gain = numbers(2, place, shape=(out_features,)) / 4 if layer.gained[place] else None
        bias = numbers(3, place, shape=(out_features,)) if layer.biased[place] else None
        found.append(Member(f"e{place}", factors, gain, bias))
    return found


@given(layers(), st.data(), st.sampled_from([0, 20, 1 << 30]))
@examples(150)
def test_a_layer_is_the_dense_sum(layer: Layer, data: st.DataObject, gap: int) -> None:
    members = _members(layer)
    row = st.tuples(*[WEIGHTS] * len(members))
    batch = Batch(tuple(data.draw(st.lists(row, min_size=1, max_size=4))), data.draw(st.integers(1, 3)))
    random = torch.Generator().manual_seed(layer.seed)
    out_features, in_features = layer.shape
    weight = torch.randn(out_features, in_features, generator=random)
    bias = torch.randn(out_features, generator=random) if layer.has_bias else None
    x = torch.randn(len(batch.weights), batch.each, in_features, generator=random)
    stack = Stack.of(members, torch.float32, torch.device("cpu"))
    columns = list(stack.gate_columns())
    gates = torch.tensor([[row[index] * scale for index, scale in columns] for row in batch.weights])
    used = {f"e{place}" for place in range(len(members)) if any(row[place] for row in batch.weights)}
    y = torch.nn.functional.linear(x, weight, bias)
    before = stacks._WORTH_A_GAP
    stacks._WORTH_A_GAP = gap
    try:
        spans = stack.spans(used)
    finally:
        stacks._WORTH_A_GAP = before
    with torch.no_grad():
        got = mixed(x, y.clone(), stack, spans, gates, bias_O=bias)
    with torch.enable_grad():
        assert torch.allclose(mixed(x, y.clone(), stack, (stack.whole(),), gates, bias_O=bias), got, atol=1e-4)
    want, sizes = _dense(members, batch.weights, x, weight, bias)
    # products of up to 9 and sums of up to 16 ranks, each rounded; every operation's rounding is a share of the sizes
    assert bool(((got.double() - want).abs() <= 64 * UNIT * sizes).all())


def _dense(
    members: Sequence[Member], weights: Sequence[Sequence[float]], x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return every row's output by its own dense matrix in float64, and what its magnitudes add up to."""
    rows, sizes = [], []
    for each, row in zip(x.double(), weights, strict=True):
        scale = torch.ones(weight.shape[0], dtype=torch.float64)
        change = torch.zeros_like(weight, dtype=torch.float64)
        much = torch.zeros_like(change)
        added = torch.zeros(weight.shape[0], dtype=torch.float64)
        for member, share in zip(members, row, strict=True):
            factors = member.factors
            change += share * factors.scaling * factors.b_OR.double() @ factors.a_RI.double()
            much += abs(share * factors.scaling) * factors.b_OR.double().abs() @ factors.a_RI.double().abs()
            if member.gain_O is not None:
                scale += share * member.gain_O.double()
                much += abs(share) * member.gain_O.double().abs()[:, None] * weight.double().abs()
            if member.bias_O is not None:
                added += share * factors.scaling * member.bias_O.double()
        own = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
        rows.append(each @ (scale[:, None] * weight.double() + change).T + own + added)
        # the base's output is rounded before DoRA takes the bias out of it again, scaled
        spread = (abs(scale - 1) + 1) * (each.abs() @ weight.double().abs().T + 2 * own.abs())
        sizes.append(spread + each.abs() @ much.T + added.abs() + sum(map(abs, row)))
    return torch.stack(rows), torch.stack(sizes)


@given(layers())
@examples(60)
def test_a_stack_of_its_own_members_is_itself(layer: Layer) -> None:
    stack = Stack.of(_members(layer), torch.float32, torch.device("cpu"))
    again = Stack.of(stack.members(), torch.float32, torch.device("cpu"))
    for one, other in zip(_members(layer), again.members(), strict=True):
        assert one.expert == other.expert
        assert one.factors.scaling == other.factors.scaling
        assert torch.equal(one.factors.a_RI, other.factors.a_RI)
        assert torch.equal(one.factors.b_OR, other.factors.b_OR)
        for mine, theirs in ((one.gain_O, other.gain_O), (one.bias_O, other.bias_O)):
            assert (mine is None) == (theirs is None)
            assert mine is None or theirs is None or torch.equal(mine, theirs)
    assert again.a_CI.shape == stack.a_CI.shape


def test_as_that_differ_in_one_number_are_two() -> None:
    a_RI, b_OR = torch.ones(3, 5), torch.ones(4, 3)
    other = a_RI.clone()
    other[2, 4] += 2.0**-23
    pair = [Member("one", Factors(a_RI, b_OR)), Member("other", Factors(other, b_OR))]
    assert Stack.of(pair, torch.float32, torch.device("cpu")).columns_K is None
    # in bfloat16 they are one
    columns = Stack.of(pair, torch.bfloat16, torch.device("cpu")).columns_K
    assert columns is not None
    assert columns.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> dict[str, tuple[SoupModel, list[Path]]]:
    found = {}
    for name, write in (("free", write_experts), ("shared", write_shared)):
        folders = write(tmp_path_factory.mktemp(name))
        found[name] = (open_model(small_base, folders[0].parent), folders)
    return found


ROW = st.dictionaries(st.sampled_from(["cold", "plain", "warm"]), WEIGHTS) | st.none()


@given(
    st.sampled_from(["free", "shared"]),
    st.lists(st.tuples(ROW, st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 3),
)
@examples(30)
def test_a_batchs_rows_padding_and_order_do_not_matter(
    models: dict[str, tuple[SoupModel, list[Path]]],
    small_base: Path,
    kind: str,
    rows: list[tuple[dict[str, float] | None, int]],
    extra: int,
) -> None:
    model, folders = models[kind]
    width = max(length for _, length in rows) + extra
    random = torch.Generator().manual_seed(len(rows) * 100 + width)
    ids = torch.randint(6, 300, (len(rows), width), generator=random)
    mask = torch.zeros_like(ids)
    for place, (_, length) in enumerate(rows):
        mask[place, width - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), model.mixture([weights for weights, _ in rows]):
        got = model(input_ids=ids * mask, attention_mask=mask, position_ids=positions).logits
    for place, (weights, length) in enumerate(rows):
        named = [folder for folder in folders if (weights or {}).get(folder.name)]
        true = float64_model(small_base, named, [(weights or {})[folder.name] for folder in named])
        with torch.no_grad():
            want = true(input_ids=ids[place : place + 1, width - length :]).logits[0]
        assert relative(got[place, width - length :], want) < LOGITS
