"""Prompts for a pool of questions, and the progress of making it. Several groups of commands make pools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli import render
from personalized_soups.cli.bases import EMBEDDED
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.users.answers.making import OnProgress

# Each prompt gives about two questions, so that answers to one prompt differ in several ways.
_QUESTIONS_PER_PROMPT = 2


def prompts_of(file: Path | None, base: str, num_questions: int, seed: int) -> list[str]:
    """Return the prompts of the file, or for the embedded base questions about its validation topics.

    Experts are trained on other topics, and evaluations ask about held-out topics.

    Raises:
        UsageError: if there is no file, and the base is not the embedded one.
    """
    if file is not None:
        from personalized_soups.generation.prompts import read_prompts

        return read_prompts(file)
    if base != EMBEDDED:
        raise UsageError(
            "no prompts are given", where="prompts", mend="give a file of prompts, e.g. --prompts questions.txt"
        )
    from personalized_soups.tiny.corpus import prompts, topics

    count = -(-num_questions // _QUESTIONS_PER_PROMPT)
    return prompts("validation", min(count, len(topics("validation"))), seed)


@contextmanager
def pool_progress(*, quiet: bool) -> Iterator[OnProgress]:
    """Yield a function that shows a progress bar for each stage of making a pool."""
    with ExitStack() as stack:
        bars: dict[str, render.Bar] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                stack.close()  # ends the bar of the stage before
                bars[stage] = stack.enter_context(render.progress(stage, total, quiet=quiet))
            bars[stage].update(done)

        yield on_progress
