"""Decoding a batch with a model that is loaded: the rate at which its rows grow, each by the likeliest token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.profiles import random_weights

ROWS = 16
_PROMPT_TOKENS = 16


def prompts(vocab: int, device: str) -> torch.Tensor:
    """Return random token ids, the same each time."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (ROWS, _PROMPT_TOKENS), generator=draw).to(device)


def profiles() -> Sequence[Mapping[str, float]]:
    """Return the weights of as many users as there are rows."""
    return list(random_weights(ROWS).values())


def load(base: str, device: str, dtype: str) -> Any:
    """Return a base from its folder."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def made(config: Mapping[str, Any], device: str, dtype: str) -> Any:
    """Return a model of random values, without files, for shapes whose base is not built."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**config))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.eval()


def tokens_per_second(model: Any, num_steps: int, **forward: Any) -> float:
    """Return the tokens of all rows together that one second brings: the median step, after the prompt was read.

    On a GPU transformers compiles the steps into CUDA graphs, as its generate does with a static cache.

    Args:
        model: anything that is called as a causal language model.
        num_steps: of one token for each row.
        forward: further arguments of its forward.
    """
    device = str(model.device)
    ids = prompts(model.config.vocab_size, device)
    if device.startswith("cuda"):
        return _of_graphs(model, ids, num_steps)
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, **forward)
        seconds = []
        for _ in range(num_steps):
            token = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **forward)
            seconds.append(time.perf_counter() - start)
    return ROWS / statistics.median(seconds)


def _of_graphs(model: Any, ids: torch.Tensor, num_steps: int) -> float:
    """Return the rate of generate's compiled steps: the difference of a long and a short answer."""

    def seconds(num_tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
                cache_implementation="static", pad_token_id=0,
            )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    few = 4
    for _ in range(2):  # compiles, then captures
        seconds(few + num_steps)
    rounds = [seconds(few + num_steps) - seconds(few) for _ in range(3)]
    return ROWS * num_steps / statistics.median(rounds)
