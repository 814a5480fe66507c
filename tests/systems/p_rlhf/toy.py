"""The toy of P-DPO: ten users, of whom seven like the longer of two answers and three like the shorter one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS = [f"w{number}" for number in range(12)]
MAJORITY = [f"long{number}" for number in range(7)]
MINORITY = [f"short{number}" for number in range(3)]


def write_base(folder: Path, *, seed: int, steps: int = 150) -> Path:
    """Write a Llama of width 32 with two layers, pre-trained on answers of 1 to 10 random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", ":", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    random = np.random.default_rng([seed, 0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            rows = [tokenizer(f"{prompt(random)}{answer(random)} <eos>")["input_ids"] for _ in range(32)]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
            loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, size=random.integers(1, 4))) + " :"


def answer(random: np.random.Generator, length: int | None = None) -> str:
    return " " + " ".join(random.choice(WORDS, size=random.integers(1, 11) if length is None else length))


def pair(random: np.random.Generator, user: str) -> dict[str, Any]:
    """Return a random pair with different lengths, as the user ranks it."""
    short, long = sorted(random.choice(np.arange(1, 11), size=2, replace=False).tolist())
    answers = answer(random, short), answer(random, long)
    chosen, rejected = answers if user in MINORITY else answers[::-1]
    return {"prompt": prompt(random), "chosen": chosen, "rejected": rejected, "user": user}


def write_pairs(path: Path, count: int, *, seed: int) -> Path:
    random = np.random.default_rng([seed, 1])
    users = [*MAJORITY, *MINORITY]
    rows = [pair(random, users[index % 10]) for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def accuracy(base: Any, policy: Any, tokenizer: Any, pairs: list[dict[str, Any]], soft: Tensor | None) -> float:
    """Return the share of pairs with a greater implicit reward of the chosen answer. Every row is computed alone."""
    right = 0
    for row in pairs:
        chosen, rejected = (
            log_prob(policy, tokenizer, row["prompt"], row[name], soft)
            - log_prob(base, tokenizer, row["prompt"], row[name], None)
            for name in ("chosen", "rejected")
        )
        right += chosen > rejected
    return right / len(pairs)


def log_prob(model: Any, tokenizer: Any, prompt_text: str, text: str, soft: Tensor | None) -> float:
    before = tokenizer(prompt_text)["input_ids"]
    ids = torch.tensor(tokenizer(f"{prompt_text}{text} <eos>")["input_ids"])
    embeds = model.get_input_embeddings()(ids)
    if soft is not None:
        embeds = torch.cat([soft, embeds])
    with torch.no_grad():
        scores = model(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
    tokens = ids[len(before) :]
    return float(scores[-len(tokens) - 1 : -1].gather(1, tokens[:, None]).sum())
