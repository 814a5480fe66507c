"""Build the tiny base: train its tokenizer and model on the corpus, and record the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import fsum
from pathlib import Path
from typing import Any

from personalized_soups.adapters.provenance import library_versions
from personalized_soups.files.atomic import new_folder
from personalized_soups.files.file_names import TINY_BASE_FILE
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.tiny import scorers
from personalized_soups.tiny.corpus import documents, prompts
from personalized_soups.tiny.pretraining import BaseRecipe, build_model, build_tokenizer, train

NUM_FIRST_LOSSES = 20
NUM_SCORED = 192
TEMPERATURE = 0.7
MAX_NEW_TOKENS = 200


def build(
    out: Path,
    recipe: BaseRecipe | None = None,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the base, write its folder atomically, and return the contents of `base.json`.

    Args:
        out: the folder to write. It contains config.json, model.safetensors (float32), the tokenizer and base.json.
        recipe: the settings. If None, the settings of the shipped base are used.
        on_step: called after each step with the step's number and loss.
        overwrite: replace `out` if this function wrote it.

    Raises:
        OutputExistsError: if `out` exists and may not be replaced.
    """
    recipe = recipe or BaseRecipe()
    with new_folder(out, overwrite) as scratch:
        tokenizer = build_tokenizer(recipe)
        model = build_model(recipe, tokenizer)
        losses = train(recipe, tokenizer, model, on_step=on_step)
        with quiet_transformers():
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        record: dict[str, Any] = {
            "recipe": asdict(recipe),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "corpus_sha256": corpus_digest(recipe),
            "first_losses": [round(loss, 6) for loss in losses[:NUM_FIRST_LOSSES]],
            "last_loss": round(fsum(losses[-100:]) / len(losses[-100:]), 4),
            "scores": score(Generator(model, tokenizer)),
            "versions": library_versions("torch", "transformers", "tokenizers"),
        }
        record["files"] = sorted([TINY_BASE_FILE, *(path.name for path in scratch.iterdir())])
        (scratch / TINY_BASE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        mode = (scratch / TINY_BASE_FILE).stat().st_mode & 0o777
        for path in scratch.iterdir():
            path.chmod(mode)  # safetensors ignores the umask and writes mode 0600
    return record


def corpus_digest(recipe: BaseRecipe) -> str:
    """Return the SHA-256 digest of all documents that the recipe trains on, in order."""
    digest = hashlib.sha256()
    for entry in documents(recipe.steps * recipe.batch_size, recipe.seed):
        digest.update(f"{entry.prompt}\n{entry.answer}\n".encode())
    return digest.hexdigest()


def score(generator: Generator, *, num_prompts: int = NUM_SCORED, seed: int = 0) -> dict[str, float]:
    """Return the base's share of valid answers, and the mean score of the valid answers in each dimension.

    Answers are sampled at temperature 0.7 on validation topics, which are used neither for training nor for evaluation.
    """
    questions = prompts("validation", num_prompts, seed)
    answers = [
        answer
        for (answer,) in generator.answers(
            questions, temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS, batch_size=num_prompts, seed=seed
        )
    ]
    means = {"valid": _mean([scorers.is_valid(*pair) for pair in zip(questions, answers, strict=True)])}
    for name in ("expertise", "informativeness", "style"):
        scored = [getattr(scorers, name)(*pair) for pair in zip(questions, answers, strict=True)]
        means[name] = round(_mean([entry.value for entry in scored if entry.valid]), 4)
    return means


def first_losses(recipe: BaseRecipe, count: int) -> list[float]:
    """Return the losses of the first `count` steps of a full run."""
    tokenizer = build_tokenizer(recipe)
    return train(recipe, tokenizer, build_model(recipe, tokenizer), max_steps=count)


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else 0.0
