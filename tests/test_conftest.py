from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest


def test_a_connection_that_leaves_the_machine_is_refused() -> None:
    with socket.socket() as client, pytest.raises(RuntimeError, match="tried to reach the network"):
        client.connect(("192.0.2.1", 80))


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
        assert client.getpeername() == server.getsockname()


def test_the_small_base_answers_a_chat(small_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_base)
    model: Any = AutoModelForCausalLM.from_pretrained(small_base)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Wash the kettle: ü?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>Wash the kettle: ü?<|assistant|>"
    batch = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0]) == text
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape == (1, batch["input_ids"].shape[1] + 3) or answer[0, -1] == tokenizer.eos_token_id
    assert model.dtype == torch.float32
