"""Which profile each prompt of a batch has, and how many rows of the batch each prompt takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from personalized_soups.declare.expert_weights import ProfileLike
from personalized_soups.errors import UsageError
from personalized_soups.generation.prompts import Prompt, check_text


class AsSet(Enum):
    """The type of `AS_SET`, the default of `profiles` arguments."""

    AS_SET = "as set"


# Answer with the mixture that is set, or else with the served profile.
AS_SET = AsSet.AS_SET


def profile_per_prompt(
    prompts: Sequence[object], profiles: ProfileLike | Sequence[ProfileLike] | AsSet
) -> list[ProfileLike] | AsSet:
    """Return one profile for each prompt. A single profile is repeated for all prompts; AS_SET is returned as it is.

    Raises:
        UsageError: if there are no prompts, or if the numbers of profiles and prompts differ.
    """
    if not prompts:
        raise UsageError("there are no prompts", where="prompts", mend="give at least one prompt")
    if isinstance(profiles, AsSet):
        return profiles
    # None is a profile: the base alone. A str is one name, although it is a Sequence.
    if profiles is None or isinstance(profiles, str) or not isinstance(profiles, Sequence):
        return [profiles] * len(prompts)
    if len(profiles) != len(prompts):
        raise UsageError(
            f"the number of profiles is {len(profiles)}, but the number of prompts is {len(prompts)}",
            where="profiles",
            mend="give one profile for each prompt (None is the base alone), or a single profile for all prompts",
        )
    return list(profiles)


def checked_prompts(prompts: Any) -> list[Prompt]:
    """Return the prompts as a list. A single text becomes a list of one prompt, and None becomes an empty list.

    Raises:
        UsageError: if `prompts` is neither a text nor a list, or a prompt is neither a text nor a chat.
        InputError: if a text is empty or not valid Unicode.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Sequence) else None
    if listed is None and prompts is not None:
        raise UsageError(
            f"prompts must be a text or a list, but it is of type {type(prompts).__name__}",
            where="prompts",
            mend="give a list of texts, or give token ids as input_ids=...",
        )
    for prompt in listed or []:
        # If one chat is given in place of a list of chats, each `prompt` here is a message.
        if isinstance(prompt, Mapping) or not isinstance(prompt, str | Sequence):
            raise UsageError(
                f"a prompt must be a text or a chat, but it is of type {type(prompt).__name__}",
                where="prompts",
                mend='give a list of texts or chats; a list of one chat is [[{"role": "user", "content": "..."}]]',
            )
        if isinstance(prompt, str):
            check_text(prompt, where="prompts")
    return listed or []


def rows_per_prompt(options: Mapping[str, Any], config: Any) -> int:
    """Return how many rows of the batch transformers' generate makes of each prompt.

    This is the number of beams if there are several, or else the number of answers to each prompt.

    Args:
        options: arguments of transformers' generate.
        config: the generation config, whose values apply to arguments that `options` lacks.
    """

    def value(name: str) -> int:
        return int(options.get(name) or getattr(config, name, None) or 1)

    beams = value("num_beams")
    # With several beams, the returned sequences are chosen among the beams and need no further rows.
    return beams if beams > 1 else value("num_return_sequences")
