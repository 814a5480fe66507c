"""Reward models against the same weights computed one text at a time, without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from personalized_soups.errors import FileFormatError, InputError, UsageError
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.reward_models import RewardModels

ITEMS = [
    TextItem("How do I wash the kettle?", "Wash it with warm water and soap, then rub it dry."),
    TextItem("wash", "rub"),
    TextItem("How do I wash the old kettle?", "With a clean towel."),
]

# Float32 against float64 at these sizes, relative to the largest reward; see tests/mixing/worlds.py.
RELATIVE = 1e-5


def write_decoder(folder: Path, base: Path, *, num_labels: int = 1, seed: int = 0, pad: str = "<|eos|>") -> Path:
    """A random Llama with an output layer. Its padding token is its end token, as in many released reward models."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = pad
    config: Any = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_encoder(folder: Path, base: Path) -> Path:
    """A random BERT with an output layer, whose tokenizer has no template."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    config: Any = BertConfig(
        initializer_range=0.3,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def one_by_one(model: Any, texts: list[list[int]]) -> np.ndarray:
    """The logit of each text from its own float64 pass."""
    with torch.no_grad():
        return np.array([float(model.double().eval()(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in texts])


@pytest.mark.parametrize("pad", ["<|eos|>", "<|pad|>"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_decoder_scores_the_last_token_of_the_conversation(
    tmp_path: Path, small_base: Path, pad: str, batch_size: int
) -> None:
    folder = write_decoder(tmp_path / "decoder", small_base, pad=pad)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).double().eval()
    texts = [f"<|user|>{item.prompt}<|assistant|>{item.answer}<|eos|>" for item in ITEMS]
    want = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        want.append(float(model.score.weight[0].detach() @ hidden))
    got = RewardModels({"help": folder}, device="cpu", batch_size=batch_size).features(ITEMS)
    assert got.shape == (3, 1)
    assert got[:, 0] == pytest.approx(want, abs=RELATIVE * float(np.abs(want).max()))
    assert np.ptp(want) > 1e-2


def test_an_encoder_reads_a_pair_of_texts(tmp_path: Path, small_base: Path) -> None:
    folder = write_encoder(tmp_path / "encoder", small_base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder)
    want = one_by_one(model, [tokenizer(item.prompt, item.answer)["input_ids"] for item in ITEMS])
    got = RewardModels({"help": folder}, device="cpu").features(ITEMS)[:, 0]
    assert got == pytest.approx(want, abs=RELATIVE * float(np.abs(want).max()))
    assert np.ptp(want) > 1e-3


def test_several_models_give_several_rewards(tmp_path: Path, small_base: Path) -> None:
    first = write_decoder(tmp_path / "first", small_base)
    second = write_decoder(tmp_path / "second", small_base, seed=5)
    both = RewardModels({"second": second, "first": first}, device="cpu")
    assert both.names == ("second", "first")
    alone = RewardModels({"first": first}, device="cpu")
    assert both.features(ITEMS)[:, 1].tolist() == alone.features(ITEMS)[:, 0].tolist()
    assert both.features([]).shape == (0, 2)
    digests = {both.digest, alone.digest, RewardModels({"first": second}, device="cpu").digest}
    assert len(digests) == 3


def test_models_that_give_no_single_reward_are_rejected(tmp_path: Path, small_base: Path) -> None:
    two = write_decoder(tmp_path / "two", small_base, num_labels=2)
    with pytest.raises(FileFormatError, match="has 2 outputs"):
        RewardModels({"help": two}, device="cpu")
    # a language model has no output layer, which transformers would fill with random numbers
    with pytest.raises(InputError, match=r"lack 1 of its tensors, such as score\.weight"):
        RewardModels({"help": small_base}, device="cpu")
    with pytest.raises(InputError) as caught:
        RewardModels({"help": tmp_path / "none"}, device="cpu")
    assert caught.value.where == str(tmp_path / "none")
    with pytest.raises(UsageError, match="there are no reward models"):
        RewardModels({})


def test_a_text_that_is_too_long_is_rejected(tmp_path: Path, small_base: Path) -> None:
    folder = write_decoder(tmp_path / "decoder", small_base)
    with pytest.raises(InputError, match="but the reward model takes at most 128"):
        RewardModels({"help": folder}, device="cpu").features([TextItem("wash", "rub it dry with soap " * 40)])
