"""Reward models: they learn to prefer what the pairs prefer, and score alone as they were trained."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups.adapters.provenance import read_expert_record
from personalized_soups.declare.training import RewardRecipe
from personalized_soups.errors import InputError, OutputExistsError
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.reward_models import RewardModels
from personalized_soups.training.encoding import EncodedPair, EncodedPairs
from personalized_soups.training.reward import train_reward_model
from personalized_soups.training.reward_trainer import spare_id
from tests.training.heard import Heard

RECIPE = RewardRecipe.model_validate_json(
    """{
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "reward": {"max_length": 64},
    "optimizer": {"learning_rate": 0.005, "warmup_steps": 2, "epochs": 2, "batch_size": 4},
    "save_steps": 3
}"""
)


def train(base: Path, data: Path, out: Path, **options: Any) -> Path:
    return train_reward_model("concise", base=base, data=data, out=out, recipe=RECIPE, device="cpu", **options)


@pytest.fixture(scope="module")
def folder(small_base: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small_base, pairs_file, tmp_path_factory.mktemp("reward") / "concise")


def new_items() -> list[TextItem]:
    """Return, for prompts that the pairs do not have, a short and a long answer each."""
    items = []
    for number in range(100, 112):
        thing = ["kettle", "towel", "soap", "water"][number % 4]
        prompt = f"how to wash the {thing} {number}?"
        long = f"wash the old {thing} with warm water and soap " * (1 + number % 2) + "then rub it dry"
        items += [TextItem(prompt, f"rub the {thing}"), TextItem(prompt, long)]
    return items


def test_the_shorter_answer_gets_the_higher_reward(folder: Path) -> None:
    rewards = RewardModels({"concise": folder}, device="cpu").features(new_items())[:, 0]
    assert (rewards[::2] > rewards[1::2]).all()


def test_the_folder_is_a_peft_adapter_with_its_output_layer(folder: Path, small_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    record = read_expert_record(folder)
    assert record is not None
    assert (record.method, record.side) == ("reward", "concise")
    assert {"margin", "accuracy", "loss"} <= set(record.metrics)
    torch.manual_seed(99)  # the output layer comes from the adapter, whatever is drawn here
    base = AutoModelForSequenceClassification.from_pretrained(str(small_base), num_labels=1)
    with quiet_transformers():  # PEFT reads an attribute that transformers has renamed
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(small_base))
    items = new_items()
    expected = []
    for item in items:
        messages = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(float(model(input_ids=ids).logits[0, 0]))  # alone, so nothing is padded
    rewards = RewardModels({"concise": folder}, device="cpu").features(items)[:, 0]
    # float32: the merged weights and the batch change the order of sums over at most a few hundred terms
    np.testing.assert_allclose(rewards, expected, atol=2e-5)


def test_training_sees_the_texts_that_are_scored(small_base: Path, pairs_file: Path, tmp_path: Path) -> None:
    """The margin of a step of learning rate 0 equals that of the finished model on the same pairs."""
    still = RECIPE.replaced(
        optimizer=RECIPE.optimizer.replaced(learning_rate=1e-12, batch_size=19, epochs=1, warmup_steps=0),
        lora=RECIPE.lora.replaced(dropout=0.0),
    )
    heard = Heard()
    out = train_reward_model(
        "concise", base=small_base, data=pairs_file, out=tmp_path / "r", recipe=still, device="cpu", progress=heard
    )
    pairs = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    chosen, rejected = (
        [TextItem(pair["prompt"][0]["content"], pair[field][0]["content"]) for pair in pairs]
        for field in ("chosen", "rejected")
    )
    models = RewardModels({"concise": out}, device="cpu")
    margin = float((models.features(chosen) - models.features(rejected)).mean())
    assert len(heard.reports) == 1
    assert heard.reports[0].figures["margin"] == pytest.approx(margin, abs=2e-5)
    assert abs(margin) > 1e-3  # the texts differ, and so do their rewards


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bytes(
    folder: Path, small_base: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "concise"
    with pytest.raises(KeyboardInterrupt):
        train(small_base, pairs_file, out, progress=Heard(stop_at=5))
    assert not out.exists()
    heard = Heard()
    train(small_base, pairs_file, out, resume=True, progress=heard)
    assert [report.step for report in heard.reports] == list(range(4, 11))  # from the checkpoint of step 3
    for name in ("adapter_model.safetensors", "adapter_config.json", "expert.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_wrong_folders_are_rejected(folder: Path, small_base: Path, pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError):
        train(small_base, pairs_file, folder)
    record = json.loads((folder / "expert.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    for changed in ({"method": None}, {"base": {"name": None, "fingerprint": None}}):
        (copy / "expert.json").write_text(json.dumps(record | changed))
        with pytest.raises(InputError, match="not a reward model"):
            RewardModels({"x": copy}, device="cpu")
    (copy / "expert.json").write_text(json.dumps(record))
    (copy / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(InputError, match="the file is not JSON"):
        RewardModels({"x": copy}, device="cpu")


def test_the_padding_id_occurs_in_no_text() -> None:
    pairs = EncodedPairs(max_length=3, is_chat=False)
    pairs.add(EncodedPair(array("i", [0, 4]), array("i", [1, 7]), array("i", [2, 7]), "pairs.jsonl:1"))
    assert spare_id(pairs, SimpleNamespace(pad_token_id=5)) == 5
    assert spare_id(pairs, SimpleNamespace(pad_token_id=7)) == 7  # it is cut off
    for own in (2, None):
        assert spare_id(pairs, SimpleNamespace(pad_token_id=own)) == 3
