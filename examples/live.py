"""Live weights: change the soup of one loaded model in place, within microseconds.

The experts are random, for the base that ships with the package. Run it with: python examples/live.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from personalized_soups import TINY_BASE, ExpertLibrary, Generator, LiveAdapter, Profile

USERS = [Profile(user="Ada", weights={"bold": 2}), Profile(user="Ben", weights={"bold": -1, "calm": 2})]
PROMPT = "How do I clean an old kettle?"


def main() -> None:
    """Print the answers of the base and of two users' soups, all by one model."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as experts:
        for name in ("bold", "calm"):
            write_random_expert(Path(experts) / name)
        live = LiveAdapter(ExpertLibrary.open(experts), device="cpu")
    base = Generator.open(TINY_BASE, device="cpu")
    generator = Generator(live.attach(base.model), base.tokenizer)
    print(f"the base: {answer(generator)}\n")
    for profile in USERS:
        live.set(profile)
        print(f"{profile.user}: {answer(generator)}\n")


def write_random_expert(folder: Path) -> None:
    """Write a LoRA folder as PEFT does, with random numbers in both factors."""
    model = Generator.open(TINY_BASE, device="cpu").model
    get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")).save_pretrained(folder)


def answer(generator: Generator) -> str:
    """Return the likeliest answer."""
    ((text,),) = generator.answers([PROMPT], greedy=True, max_new_tokens=40)
    return text


if __name__ == "__main__":
    main()
