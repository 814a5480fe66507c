"""Sample answers to prompts from a base: the pool, which is sampled once and gives pairs for every side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.declare.json_lines import LineKind, declared_lines
from personalized_soups.declare.preference_data import Rollout
from personalized_soups.errors import InputError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.prompts import with_text_before
from personalized_soups.training.data import write_lines
from personalized_soups.training.instructions import InstructedShare, repeats

_KIND = LineKind("prompt with its answers", '{"prompt": "...", "answers": ["...", "..."]}')


@dataclass(frozen=True, slots=True)
class Sampled:
    """One prompt and the answers that were sampled for it.

    Attributes:
        prompt: the plain prompt.
        answers: the answers, in the order of sampling.
        instructions: the instruction under which each answer was sampled, or None for a plain answer. It is empty if
            all answers are plain.
    """

    prompt: str
    answers: tuple[str, ...]
    instructions: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        """Check that each answer has its instruction, and make the instructions of plain answers empty."""
        if self.instructions and len(self.instructions) != len(self.answers):
            raise ValueError(f"{len(self.answers)} answers have {len(self.instructions)} instructions")
        if not any(self.instructions):
            object.__setattr__(self, "instructions", ())

    def without_echoes(self) -> tuple[str, ...]:
        """Return the answers that do not repeat the instruction under which they were sampled."""
        if not self.instructions:
            return self.answers
        return tuple(
            answer
            for answer, instruction in zip(self.answers, self.instructions, strict=True)
            if instruction is None or not repeats(answer, instruction)
        )

    def row(self) -> dict[str, Any]:
        """Return the line of a pool file. The line of a plain pool has no key `instructions`."""
        row: dict[str, Any] = {"prompt": self.prompt, "answers": list(self.answers)}
        return row | {"instructions": list(self.instructions)} if self.instructions else row


def sample_pool(
    generator: Generator,
    prompts: Sequence[str],
    *,
    num_samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    instructed: InstructedShare | None = None,
    first: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[Sampled]:
    """Sample `num_samples` answers to each prompt, and return them.

    Args:
        generator: samples the answers.
        prompts: the plain prompts.
        num_samples: the number of answers to each prompt, with the instructed ones.
        temperature, max_new_tokens, batch_size, seed: as for `Generator.answers`.
        instructed: how many of the answers are sampled under an instruction. By default, none.
        first: the index of the first prompt in a longer list of prompts that is sampled in portions.
        on_done: called after each batch with the number of finished answers.
    """
    share = instructed or InstructedShare(0, ())
    instructions = [share.of_prompt(first + place, num_samples=num_samples) for place in range(len(prompts))]
    asked = [
        with_text_before(prompt, instruction or "")
        for prompt, own in zip(prompts, instructions, strict=True)
        for instruction in own
    ]
    answers = generator.answers(
        asked,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        places=range(first * num_samples, first * num_samples + len(asked)),
        on_done=on_done,
    )
    texts = [text for (text,) in answers]
    return [
        Sampled(prompt, tuple(texts[place * num_samples : (place + 1) * num_samples]), instructions[place])
        for place, prompt in enumerate(prompts)
    ]


def write_pool(path: Path, pool: Sequence[Sampled]) -> None:
    """Write a pool as JSON lines. A failed write leaves `path` as it was."""
    write_lines(path, [sampled.row() for sampled in pool])


def read_pool(path: Path) -> list[Sampled]:
    """Return the pool from a file that `write_pool` has written.

    Raises:
        DeclarationError: if the file cannot be read, or has a line that is not a prompt with answers.
        InputError: if the file has no lines.
    """
    pool = list(pool_lines(path))
    if not pool:
        raise InputError("the file of sampled answers is empty", where=str(path), mend="sample the answers again")
    return pool


def pool_lines(path: Path) -> Iterator[Sampled]:
    """Yield the lines of a pool's file. Only one is in memory.

    Raises:
        DeclarationError: if the file cannot be read, or has a line that is not a prompt with answers.
    """
    for line in declared_lines(path, Rollout, _KIND):
        yield Sampled(line.prompt, line.answers, line.instructions)
