"""Keys and values in slots: a row's logits are those of its tokens alone while rows join, leave and move."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from personalized_soups import SoupModel
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.errors import UsageError
from personalized_soups.serving.engine.attention import layer_kinds
from personalized_soups.serving.engine.batch import Batch
from personalized_soups.serving.engine.kv_slots import KvSlots
from tests.serving.engine.worlds import BASES, VOCAB, WINDOW, small_model, small_soup, some_weights, true_logits

# Both sides sum fewer than 1000 terms below 100 in float64: each is off by less than 1000 eps of the terms' size, and a
# layer multiplies that by ten at most. The eager softmax is computed in float32, in which ten roundings are 1e-6. A
# wrong key or position changes logits by at least 0.01.
NEAR = {"sdpa": 1e-9, "eager": 1e-5}

# Bytes of a token in the small Llama: keys and values of two layers with two heads of eight numbers in float64.
BYTES = 2 * 2 * 2 * 8 * 8

KINDS = [
    pytest.param(name, attention, id=f"{name}-{attention}")
    for name in BASES
    for attention in ("sdpa", "eager")
    if name != "gpt_oss" and (name, attention) != ("gemma2", "sdpa")
]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Enter inference mode, as the batcher's thread does: tensors made there cannot be changed outside."""
    with torch.inference_mode():
        yield


class World:
    """Slots used as a batch uses them, and the tokens of each slot as a list."""

    def __init__(self, model: SoupModel, max_bytes: int | None = None) -> None:
        self.model = model
        self.slots = KvSlots(model.model.config, max_bytes)
        self.rows: list[tuple[ExpertWeights, list[int]]] = []

    def forward(self, first: int, chunks: list[list[int]]) -> Tensor:
        """Append tokens to the rows from `first` on, and return the logits after the last ones."""
        rows = self.rows[first : first + len(chunks)]
        most = max(map(len, chunks))
        inputs = self.slots.place(first, [len(row[1]) for row in rows], list(map(len, chunks)), torch.device("cpu"))
        ids_NQ = torch.tensor([[0] * (most - len(chunk)) + chunk for chunk in chunks])
        with self.model.mixture([row[0] for row in rows]):
            logits: Tensor = self.model.model(input_ids=ids_NQ, use_cache=True, **inputs).logits[:, -1]
        for row, chunk in zip(rows, chunks, strict=True):
            row[1].extend(chunk)
        return logits

    def check(self, first: int, chunks: list[list[int]]) -> None:
        logits = self.forward(first, chunks)
        for row, got in zip(self.rows[first:], logits, strict=False):
            want = true_logits(self.model, *row)[-1]
            off, most = float((got - want).abs().max()), max(1.0, float(want.abs().max()))
            assert off < NEAR[self.model.config._attn_implementation] * most

    def leave(self, slot: int) -> None:
        self._spoil(slot)
        last = self.rows.pop()
        if slot < len(self.rows):
            self.slots.move(len(self.rows), slot, len(last[1]))
            self.rows[slot] = last

    def poison(self) -> None:
        """Overwrite with NaN what padding wrote, and what rows that have left wrote."""
        for slot in range(len(self.rows), self.slots.num_slots):
            self._spoil(slot)
        for layer in self.slots._layers:
            for stored in (layer.keys, layer.values) if layer.is_initialized else ():
                stored[:, :, -1] = torch.nan

    def _spoil(self, slot: int) -> None:
        for layer in self.slots._layers:
            for stored in (layer.keys, layer.values) if layer.is_initialized else ():
                stored[slot, :, : self.slots._written[slot]] = torch.nan


def _run(world: World, random: random.Random, num_events: int, *, longest: int = 9) -> None:
    """Let rows join, continue and leave at random, and compare all logits."""

    def tokens(count: int) -> list[int]:
        return [random.randrange(6, VOCAB) for _ in range(count)]

    for _ in range(num_events):
        event = random.random()
        if not world.rows or (event < 0.3 and len(world.rows) < 6):
            count = random.randint(1, 3)
            first = len(world.rows)
            world.rows.extend((some_weights(random), []) for _ in range(count))
            world.check(first, [tokens(random.randint(1, longest)) for _ in range(count)])
        elif event < 0.4:  # a prompt in three parts
            world.rows.append((some_weights(random), []))
            for _ in range(3):
                world.check(len(world.rows) - 1, [tokens(random.randint(1, longest))])
        elif event < 0.5:  # several tokens for each of the last rows, including a new one
            first = random.randrange(len(world.rows))
            world.rows.append((some_weights(random), []))
            world.check(first, [tokens(random.randint(1, 3)) for _ in world.rows[first:]])
        elif event < 0.65:
            world.leave(random.randrange(len(world.rows)))
        elif event < 0.72:
            world.slots.fit(len(world.rows) + random.randint(0, 9), random.randint(0, 99) + 99)
        else:
            world.check(0, [tokens(1) for _ in world.rows])
        world.poison()


@pytest.mark.parametrize(("name", "attention"), KINDS)
def test_rows_are_as_they_are_alone(tmp_path: Path, name: str, attention: str) -> None:
    world = World(small_soup(tmp_path, name, attention=attention))
    _run(world, random.Random(name), 25)
    assert world.slots.num_bytes


def test_rows_of_gpt_oss_are_as_they_are_alone(tmp_path: Path) -> None:
    # its grouped product does not support float64: float32 with 1000 terms below 10, through two layers
    model = small_model("gpt_oss", attention="eager", dtype=torch.float32)
    slots = KvSlots(model.config)
    assert slots.kinds == ("full_attention", "sliding_attention")
    prompts = [[7, 8, 9], [random.Random(0).randrange(6, VOCAB) for _ in range(2 * WINDOW)]]
    inputs = slots.place(0, [0, 0], [3, 2 * WINDOW], torch.device("cpu"))
    ids = torch.tensor([[0] * (2 * WINDOW - len(prompt)) + prompt for prompt in prompts])
    got = model(input_ids=ids, use_cache=True, **inputs).logits[:, -1]
    for row, prompt in enumerate(prompts):
        want = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(got[row], want, atol=1000 * 10 * 1.2e-7, rtol=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SoupModel:
    return small_soup(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> SoupModel:
    return small_soup(tmp_path_factory.mktemp("gemma"), "gemma3")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_rows_are_as_they_are_alone_in_any_order(llama: SoupModel, gemma: SoupModel, seed: int) -> None:
    for model in (llama, gemma):
        _run(World(model), random.Random(seed), 12, longest=40)


def test_memory_shrinks_to_the_limit_and_rows_keep_their_tokens(llama: SoupModel) -> None:
    world = World(llama, max_bytes=4 * 64 * BYTES)
    world.rows = [(ExpertWeights(), [])]
    world.slots.fit(1, 300)  # a single row may exceed the limit
    world.check(0, [list(range(6, 246))])
    assert world.slots.num_bytes == 320 * BYTES
    world.rows = [(ExpertWeights({"warm": 1.0}), [])]
    world.check(0, [[7, 8, 9]])
    world.rows.append((ExpertWeights(), []))
    world.slots.fit(2, 60)
    assert world.slots.num_bytes == 2 * 64 * BYTES
    world.check(1, [[9, 8]])
    world.poison()
    for token in range(6, 60):
        world.check(0, [[token], [token + 1]])


def test_a_failed_allocation_changes_nothing(llama: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(llama)
    world.rows = [(ExpertWeights({"warm": 1.0}), [])]
    world.check(0, [[7, 8, 9]])
    second: Any = world.slots._layers[1]
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("no more")

        patch.setattr(second, "resize", full)
        with pytest.raises(torch.OutOfMemoryError):
            world.slots.fit(9, 300)
    assert (world.slots.num_slots, world.slots.num_columns) == (1, 64)
    assert {layer.keys.shape for layer in world.slots._layers} == {second.keys.shape}
    world.check(0, [[4]])
    world.slots.fit(3, 100)
    world.rows.append((ExpertWeights(), []))
    world.check(1, [[9, 8]])
    world.check(0, [[5], [6]])


def test_fits_and_num_bytes_are_those_allocated(llama: SoupModel) -> None:
    slots = KvSlots(llama.model.config, 16 * 128 * BYTES)
    assert slots.fits(16, 127, BYTES)
    assert not slots.fits(16, 128, BYTES)  # one column is for padding
    assert not slots.fits(17, 127, BYTES)
    with llama.mixture([None] * 9):
        inputs = slots.place(0, [0] * 9, [3] * 9, torch.device("cpu"))
        llama.model(input_ids=torch.full((9, 3), 7), use_cache=True, **inputs)
    assert slots.num_bytes == 16 * 64 * BYTES
    slots.clear()
    assert slots.num_bytes == 0


def test_layers_without_keys_and_values_are_rejected() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2)
    assert layer_kinds(config) == ("full_attention",)
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UsageError, match="linear_attention"):
        layer_kinds(config)


def _odd(kind: str) -> Any:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0}
    heads = {**sizes, "num_attention_heads": 4, "initializer_range": 0.25}
    configs: dict[str, Any] = {
        "Bloom": transformers.BloomConfig(**{**sizes, "n_layer": 2, "n_head": 4}),
        "Falcon": transformers.FalconConfig(**heads, alibi=True),
        "Rwkv": transformers.RwkvConfig(**sizes),
        "Mamba": transformers.MambaConfig(**sizes),
        "GPTNeo": transformers.GPTNeoConfig(
            **{**sizes, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(configs[kind], attn_implementation="eager")
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # transformers warns about missing kernels of these models
@pytest.mark.parametrize("kind", ["Bloom", "Falcon", "Rwkv", "Mamba", "GPTNeo"])
def test_a_model_whose_rows_depend_on_each_other_is_rejected(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError) as caught:
        Batch(SoupModel(_odd(kind), []))
    assert caught.value.where == "base"


def test_attention_that_ignores_masks_is_rejected() -> None:
    model = small_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="flash_attention_2") as caught:
        KvSlots(model.config)
    assert "sdpa" in caught.value.mend
