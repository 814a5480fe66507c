"""Check that a base can take the prompts of a study, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from personalized_soups.declare.evaluation import TrainedJudge
from personalized_soups.devices import resolve_device
from personalized_soups.errors import InputError
from personalized_soups.files.file_names import MODEL_CONFIG_FILE
from personalized_soups.generation.loading import load_base, load_tokenizer
from personalized_soups.generation.prompts import encode_prompt
from personalized_soups.studies.study import Study


def check_base(study: Study) -> None:
    """Check that the base has a chat template, and that its context has room for every prompt and its answer.

    It is also checked that there are enough prompts for the judges that the study trains.

    A base of the hub is downloaded first, because the settings of a study have its fingerprint.

    Raises:
        InputError: if a check fails, or the base cannot be loaded.
    """
    if not Path(study.base).is_dir():
        load_base(study.base, device=resolve_device("cpu"), dtype="auto")
    if load_tokenizer(study.base).chat_template is None:
        raise InputError(
            "the base has no chat template, so it continues prompts instead of answering them",
            where=str(study.base),
            mend="give a base that was tuned for chats, or put a chat_template.jinja into its folder",
        )
    for judge in study.recipe.judges.values():
        if isinstance(judge, TrainedJudge):
            study.judge_prompts(judge.num_prompts)
    context = _context(study.base)
    if context is None:
        return
    count = token_counter(study.base)
    # The longest text before a prompt is that of the combination with the most tokens.
    before = max(count(study.catalogue.instructions(sides) + "\n\n") for sides in study.combinations)
    prompts = {*study.train_prompts, *study.validation_prompts, *study.test_prompts}
    longest = max(prompts, key=count)
    needed = count(longest) + before + study.recipe.max_new_tokens
    if needed > context:
        raise InputError(
            f"the longest prompt, the instructions and an answer of {study.recipe.max_new_tokens} tokens need {needed} "
            f"tokens, but the base's context has {context}",
            where=f"the prompt that begins {longest[:40]!r}",
            mend="shorten the prompt, or lower `max_new_tokens` in the recipe",
        )


@cache
def token_counter(base: Path | str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a prompt, with those of the base's chat template."""
    tokenizer = load_tokenizer(base)
    return lambda prompt: len(encode_prompt(tokenizer, prompt))


def _context(base: Path | str) -> int | None:
    """Return the number of positions in the base's config, or None if it is unknown, as for a model of the hub."""
    try:
        size = json.loads((Path(base) / MODEL_CONFIG_FILE).read_bytes()).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None
