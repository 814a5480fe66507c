"""SFT: the loss is that of the completions alone, resumed trainings are exact, and faulty lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from personalized_soups.adapters.provenance import read_expert_record
from personalized_soups.declare.training import SftRecipe
from personalized_soups.errors import InputError, SoupError
from personalized_soups.generation.loading import load_base, load_tokenizer
from personalized_soups.training.completions import encode_completions, read_completions
from personalized_soups.training.sft import train_on_completions
from tests.training.heard import Heard

RECIPE = SftRecipe.model_validate_json(
    """{
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "sft": {"max_length": 64},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "epochs": 2, "batch_size": 4},
    "save_steps": 3
}"""
)


def train(base: Path, data: Path, out: Path, recipe: SftRecipe = RECIPE, **options: Any) -> Path:
    return train_on_completions("answers", base=base, data=data, out=out, recipe=recipe, device="cpu", **options)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    things = ["kettle", "towel", "soap", "water"]
    return [
        {"prompt": f"how to wash the {things[n % 4]} {n}?", "completion": f"rub the {things[n % 4]} dry " * (1 + n % 3)}
        for n in range(19)
    ]


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_loss_is_the_mean_over_all_tokens_of_the_completions(
    is_chat: bool, rows: list[dict[str, Any]], small_base: Path, tmp_path: Path
) -> None:
    """The first loss equals one that is computed text by text, without batches, labels and TRL."""
    data = write(tmp_path / "rows.jsonl", [as_messages(row) for row in rows] if is_chat else rows)
    still = RECIPE.replaced(
        optimizer=RECIPE.optimizer.replaced(learning_rate=1e-12, batch_size=19, epochs=1, warmup_steps=0)
    )
    heard = Heard()
    train(small_base, data, tmp_path / "e", still, progress=heard)
    model, tokenizer = load_base(small_base, device=torch.device("cpu")), load_tokenizer(small_base)
    total, count = 0.0, 0
    for row in rows:
        if is_chat:
            messages = as_messages(row)
            shown = tokenizer.apply_chat_template(messages["prompt"], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages["prompt"] + messages["completion"], tokenize=False)
            prompt, ids = (tokenizer(str(text), add_special_tokens=False)["input_ids"] for text in (shown, whole))
        else:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row["completion"] + str(tokenizer.eos_token))["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        for place in range(len(prompt), len(ids)):
            total -= float(log_probs[place - 1, ids[place]])
            count += 1
    assert len(heard.reports) == 1
    # float32: sums of a few hundred terms in another order
    assert heard.reports[0].loss == pytest.approx(total / count, rel=1e-5)


def test_training_lowers_the_loss_and_records_itself(
    rows: list[dict[str, Any]], small_base: Path, tmp_path: Path
) -> None:
    heard = Heard()
    out = train(small_base, write(tmp_path / "rows.jsonl", rows), tmp_path / "e", progress=heard)
    assert sum(report.loss for report in heard.reports[-3:]) < sum(report.loss for report in heard.reports[:3])
    assert all(0 <= report.figures["token_accuracy"] <= 1 for report in heard.reports)
    record = read_expert_record(out)
    assert record is not None
    assert (record.method, record.side, record.dimension) == ("sft", "answers", None)
    assert record.data is not None
    assert record.data.num_pairs == 19


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bytes(
    rows: list[dict[str, Any]], small_base: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    whole = train(small_base, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(small_base, data, tmp_path / "cut", progress=Heard(stop_at=7))
    heard = Heard()
    cut = train(small_base, data, tmp_path / "cut", resume=True, progress=heard)
    assert [report.step for report in heard.reports] == [7, 8, 9, 10]  # from the checkpoint of step 6, in epoch 2
    for name in ("adapter_model.safetensors", "adapter_config.json", "expert.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_the_formats_of_a_line_mean_the_same(rows: list[dict[str, Any]], small_base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_base)
    chats = [as_messages(row) for row in rows]
    formats = [
        chats,
        [{"messages": row["prompt"] + row["completion"]} for row in chats],
        [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "ignored"} for row in chats],
    ]
    encoded = []
    for number, lines in enumerate(formats):
        read = read_completions(write(tmp_path / f"{number}.jsonl", lines))
        encoded.append(encode_completions(read, tokenizer, max_length=64, num_embeddings=None).columns())
    assert encoded[0] == encoded[1] == encoded[2]
    for ids, labels in zip(encoded[0]["input_ids"], encoded[0]["labels"], strict=True):
        masked = labels.count(-100)
        assert 0 < masked < len(ids)
        assert labels[masked:] == ids[masked:]


def test_long_lines_are_cut_or_left_out_with_a_note(small_base: Path, tmp_path: Path) -> None:
    long = "wash the old kettle with warm water and soap " * 12
    rows = [
        {"prompt": "wash it", "completion": "rub it dry"},
        {"prompt": "wash it", "completion": long},
        {"prompt": long, "completion": "rub it dry"},
    ]
    heard = Heard()
    train(small_base, write(tmp_path / "rows.jsonl", rows), tmp_path / "e", progress=heard)
    assert heard.notes == [
        "1 lines are left out: the prompt alone fills sft.max_length (64)",
        "1 answers are longer than sft.max_length (64) and lose their end",
    ]
    with pytest.raises(InputError, match="every prompt alone fills") as caught:
        train(small_base, write(tmp_path / "rows.jsonl", rows[2:]), tmp_path / "f")
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:1"


TEXT = '{"prompt": "a", "completion": "b"}'
CHAT = '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ('{"prompt": "a"}', "'completion' is missing"),
        ('{"completion": "a"}', "'prompt' is missing"),
        ('{"prompt": "a", "completion": " "}', "`completion` is empty"),
        ('{"prompt": 7, "completion": "a"}', "`prompt` is empty or not text"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "not a list of messages"),
        (CHAT.replace("assistant", "user"), "must begin with the role 'assistant'"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "no prompt"),
        ('{"messages": [{"role": "user", "content": "b"}]}', "must begin with the role 'assistant'"),
        (CHAT, "mixes plain text and conversations"),
    ],
)
def test_a_faulty_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{TEXT}\n{line}\n")
    with pytest.raises(SoupError, match=message) as caught:
        read_completions(path)
    assert caught.value.where.startswith(f"{path}:2")


def test_an_empty_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no completions"):
        read_completions(tmp_path / "rows.jsonl")
