"""Answers kept on disk while they are sampled, so that a sampling that was cut short goes on where it stood.

The file's first line says what is being sampled; each other line holds one prompt's answers. Prompts are sampled in
portions that do not depend on where a sampling stopped, so that it ends with the answers of one that never did.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.training.data import write_lines
from personalized_soups.training.pairs import Sampled

# Batches in a portion: prompts of like length find each other within it, and a kill costs no more than one.
_BATCHES = 8


def sample_kept(
    generator: Generator,
    prompts: Sequence[str],
    *,
    kept: Path,
    base: str,
    num_samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    on_begin: Callable[[int], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Sampled]:
    """Return `num_samples` sampled answers to each prompt; those that the file `kept` holds are not sampled again.

    Args:
        generator: answers.
        prompts: what is asked.
        kept: the file; made where it is not there, and left when all is sampled.
        base: what tells one base from another, such as its fingerprint.
        num_samples, temperature, max_new_tokens, batch_size, seed: as for `Generator.answers`.
        on_begin: hears how many answers are there already.
        on_done: hears how many answers there are so far.

    Raises:
        UsageError: if `kept` holds the unfinished answers of another sampling.
    """
    sampling: dict[str, Any] = {
        "base": base,
        "dtype": str(generator.model.dtype),
        "prompts": blake3(json.dumps(list(prompts)).encode()).hexdigest(),
        "num_prompts": len(prompts),
        "num_samples": num_samples,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }
    portion = max(1, _BATCHES * batch_size // num_samples)
    pool = _read(kept, sampling)
    if len(pool) < len(prompts):  # a portion whose writing was cut short is sampled again
        pool = pool[: len(pool) - len(pool) % portion]
    write_lines(kept, [sampling, *map(_row, pool)])
    if on_begin is not None:
        on_begin(len(pool) * num_samples)
    for first in range(len(pool), len(prompts), portion):
        asked = prompts[first : first + portion]
        answers = generator.answers(
            asked,
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            places=range(first * num_samples, (first + len(asked)) * num_samples),
            on_done=None if on_done is None else partial(_tell, on_done, first * num_samples),
        )
        pool += [Sampled(prompt, tuple(said)) for prompt, said in zip(asked, answers, strict=True)]
        with kept.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_row(sampled), ensure_ascii=False) + "\n" for sampled in pool[first:])
    return pool


def _read(kept: Path, sampling: dict[str, Any]) -> list[Sampled]:
    """Return what the file holds of this sampling; a last line that a kill cut short does not count."""
    try:
        begun, *rows = [json.loads(line) for line in kept.read_bytes().split(b"\n")[:-1]]
        pool = [Sampled(row["prompt"], tuple(row["answers"])) for row in rows]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []  # no file of ours
    differing = sorted(key for key in sampling if begun.get(key) != sampling[key])
    if not differing:
        return pool
    if not pool or len(pool) == begun.get("num_prompts"):
        return []  # nothing is lost; or it is finished, and whoever asks for other answers wants them
    raise UsageError(
        f"an interrupted sampling of other answers stands here; it differs in {', '.join(differing)}",
        where=str(kept),
        mend="give the same options to go on with it, or delete the file to start again",
    )


def _row(sampled: Sampled) -> dict[str, Any]:
    return {"prompt": sampled.prompt, "answers": list(sampled.answers)}


def _tell(on_done: Callable[[int], None], before: int, done: int) -> None:
    on_done(before + done)
