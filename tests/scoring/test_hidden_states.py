"""Hidden states against transformers, which computes one unpadded text at a time, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from personalized_soups.errors import InputError, UsageError
from personalized_soups.generation.loading import load_base, load_tokenizer
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.hidden_states import HiddenStates, Pooling
from personalized_soups.scoring.item_features import ItemTable

ITEMS = [
    TextItem("How do I wash the kettle?", "Wash it with warm water and soap, then rub it dry."),
    TextItem("wash", "rub"),
    TextItem("How do I wash the old kettle so that it looks nice again?", "With a clean towel."),
    TextItem("wash", "Éß — 水"),
]

# float32 rounds to 6e-8; a state after a few layers of unit scale keeps five digits
ROUNDING = 1e-5


def true_states(base: Path, item: TextItem, pooling: Pooling) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The last of transformers' hidden states, of the text alone, by the chat template of the fixture."""
    tokenizer = load_tokenizer(base)
    before = tokenizer(f"<|user|>{item.prompt}<|assistant|>", add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{item.answer}<|eos|>", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float64)
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor([[*before, *after]]), output_hidden_states=True)
    states = outputs.hidden_states[-1][0].numpy()
    return np.asarray(states[-1] if pooling == "last" else states[len(before) :].mean(axis=0))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_states_are_those_of_unpadded_texts(small_base: Path, pooling: Pooling, device: str) -> None:
    states = HiddenStates.open(small_base, device=device, pooling=pooling, batch_size=3)
    progress: list[int] = []
    found = states.features([*ITEMS, ITEMS[1]], on_done=progress.append)
    assert found.dtype == np.float64
    for item, row in zip([*ITEMS, ITEMS[1]], found, strict=True):
        np.testing.assert_allclose(row, true_states(small_base, item, pooling), atol=ROUNDING)
    assert progress == [3, 4]  # the repeated item is computed once


def test_a_peft_model_gives_the_states_with_its_adapter(small_base: Path) -> None:
    tokenizer, plain = load_tokenizer(small_base), HiddenStates.open(small_base, device="cpu")
    base = load_base(small_base, device=torch.device("cpu"))
    with quiet_transformers():
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    states = HiddenStates(adapted, tokenizer, base=small_base)
    np.testing.assert_allclose(states.features(ITEMS), plain.features(ITEMS), atol=ROUNDING)
    untrained = states.digest
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    assert np.abs(states.features(ITEMS) - plain.features(ITEMS)).max() > 0.01
    assert len({plain.digest, untrained, states.digest}) == 3


def test_the_digest_tells_other_features(small_base: Path) -> None:
    last, again = (HiddenStates.open(small_base, device="cpu") for _ in range(2))
    mean = HiddenStates.open(small_base, device="cpu", pooling="mean")
    half = HiddenStates.open(small_base, device="cpu", dtype="bfloat16")
    assert last.digest == again.digest
    assert len({last.digest, mean.digest, half.digest}) == 3


def test_no_items_have_a_width(small_base: Path) -> None:
    states = HiddenStates.open(small_base, device="cpu")
    assert states.features([]).shape == (0, states.features(ITEMS[:1]).shape[1])


def test_a_text_that_is_too_long_is_named(small_base: Path) -> None:
    states = HiddenStates.open(small_base, device="cpu")
    with pytest.raises(InputError, match="at most") as caught:
        states.features([TextItem("wash", "rub " * 5000)])
    assert "begins 'wash'" in caught.value.where


def test_impossible_options_are_refused(small_base: Path) -> None:
    model, tokenizer = load_base(small_base, device=torch.device("cpu")), load_tokenizer(small_base)
    with pytest.raises(UsageError, match="batch_size is 0"):
        HiddenStates(model, tokenizer, batch_size=0)
    with pytest.raises(UsageError, match="unknown pooling 'first'"):
        HiddenStates(model, tokenizer, pooling="first")  # type: ignore[arg-type]


def test_a_table_has_a_feature_for_each_item() -> None:
    table = ItemTable(["I like parties.", "I worry.", "I plan."])
    np.testing.assert_array_equal(table.features(["I plan.", "I like parties.", "I plan."]), np.eye(3)[[2, 0, 2]])
    assert table.features([]).shape == (0, 3)
    assert table.digest != ItemTable(["I worry.", "I like parties.", "I plan."]).digest
    with pytest.raises(UsageError, match="not in the table") as caught:
        table.features(["I wory."])
    assert caught.value.mend == "did you mean 'I worry.'?"
    with pytest.raises(ValueError, match="twice"):
        ItemTable([1, 2, 1])
