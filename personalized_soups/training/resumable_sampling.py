"""Sample answers and store them in a file, so that an interrupted run can be resumed.

The first line of the file records the settings. Each further line holds the answers to one prompt. Prompts are sampled
in portions of a fixed size, so a resumed run gives the same answers as an uninterrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from personalized_soups.declare.preference_data import Rollout
from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.training.data import write_lines
from personalized_soups.training.instructions import InstructedShare
from personalized_soups.training.rollouts import Sampled, sample_pool

# The number of batches in a portion. A portion is sorted by length to save padding. A kill loses at most one portion.
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
    instructed: InstructedShare | None = None,
    on_begin: Callable[[int], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Sampled]:
    """Return `num_samples` sampled answers to each prompt. Answers in the file `kept` are not sampled again.

    Args:
        generator: samples the answers.
        prompts: the prompts.
        kept: the file of the answers. It is created if it does not exist, and it stays when all answers are sampled.
        base: a text that identifies the base, e.g. its fingerprint.
        num_samples, temperature, max_new_tokens, batch_size, seed, instructed: as for `sample_pool`.
        on_begin: called once with the number of answers that the file already holds.
        on_done: called after each batch with the number of finished answers.

    Raises:
        UsageError: if `kept` holds the unfinished answers of a run with other settings.
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
    if instructed is not None and instructed.count:
        sampling["instructed"] = [instructed.count, *instructed.instructions]
    portion = max(1, _BATCHES * batch_size // num_samples)
    pool = _read(kept, sampling)
    if len(pool) < len(prompts):  # sample an incompletely written portion again
        pool = pool[: len(pool) - len(pool) % portion]
    write_lines(kept, [sampling, *(sampled.row() for sampled in pool)])
    if on_begin is not None:
        on_begin(len(pool) * num_samples)
    for first in range(len(pool), len(prompts), portion):
        pool += sample_pool(
            generator,
            prompts[first : first + portion],
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            instructed=instructed,
            first=first,
            on_done=None if on_done is None else partial(_report, on_done, first * num_samples),
        )
        with kept.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(sampled.row(), ensure_ascii=False) + "\n" for sampled in pool[first:])
    return pool


def _read(kept: Path, sampling: dict[str, Any]) -> list[Sampled]:
    """Return the answers in the file if it has the same settings. An incomplete last line is ignored."""
    try:
        first, *lines = kept.read_bytes().split(b"\n")[:-1]
        begun = json.loads(first)
        pool = [Sampled(row.prompt, row.answers, row.instructions) for row in map(Rollout.model_validate_json, lines)]
        differing = sorted(key for key in {*sampling, *begun} if begun.get(key) != sampling.get(key))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return []  # another kind of file
    if not differing:
        return pool
    if not pool or len(pool) == begun.get("num_prompts"):
        return []  # The file holds no answers, or those of a finished run: with other settings, sample new answers.
    raise UsageError(
        f"the file holds the answers of an interrupted run whose settings differ in {', '.join(differing)}",
        where=str(kept),
        mend="give the options of the interrupted run to resume it, or delete the file to start again",
    )


def _report(on_done: Callable[[int], None], before: int, done: int) -> None:
    on_done(before + done)
