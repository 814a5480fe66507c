"""The prompts of a step: those of its file, of one split, or some of them."""

from __future__ import annotations

from pathlib import Path

from personalized_soups.declare.prompt_set import load_prompt_set
from personalized_soups.declare.run_steps import Prompts
from personalized_soups.errors import InputError
from personalized_soups.generation.prompts import read_prompts


def prompts_of(path: Path, step: Prompts) -> list[str]:
    """Return the prompts that a step uses.

    Args:
        path: the file of prompts.
        step: says which of them. Those of a split are in an order that balances their kinds.

    Raises:
        InputError: if the file is invalid, or no prompt is left.
    """
    if step.split is None:
        every = read_prompts(path)
    else:
        declared = load_prompt_set(path)
        size = sum(entry.split == step.split for entry in declared.entries)
        every = list(declared.draw(step.split, size, 0))
    end = None if step.num_prompts is None else step.skip_prompts + step.num_prompts
    chosen = every[step.skip_prompts : end]
    if not chosen or (step.num_prompts is not None and len(chosen) < step.num_prompts):
        raise InputError(
            f"a step uses {step.num_prompts or 'the'} prompts after the first {step.skip_prompts}, but there are "
            f"{len(every)}",
            where=str(path),
            mend="add prompts, or change skip_prompts and num_prompts",
        )
    return chosen
