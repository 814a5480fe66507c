"""Answers of a model within a mixture: by our own sampling, or by every option that transformers' generate has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch

from personalized_soups.declare.expert_weights import ProfileLike
from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator, Within
from personalized_soups.generation.prompts import Prompt, check_text
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.generation.sampling import pad_left
from personalized_soups.mixing.active_mixture import Mixture, NextStep
from personalized_soups.mixing.fitting import fitting_rows


class AsSet(Enum):
    """What stands for the profiles where none are given: those that are set, or served, already."""

    AS_SET = "as set"


AS_SET = AsSet.AS_SET

# Enters the mixture of a batch (profiles, and rows of the batch for each), or what is set where there are none.
Mix = Callable[[Sequence[ProfileLike] | AsSet, int], AbstractContextManager[Mixture | None]]

# Decoding that asks for the logits of several tokens at once: there is no one weight for them.
_SEVERAL_TOKENS = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")


def one_for_each(
    prompts: Sequence[object], profiles: ProfileLike | Sequence[ProfileLike] | AsSet
) -> list[ProfileLike] | AsSet:
    """Return a profile for each prompt: the one that is given for all, or as many as there are prompts.

    Raises:
        UsageError: if there are no prompts, or another number of profiles.
    """
    if not prompts:
        raise UsageError("there are no prompts", where="prompts", mend="give at least one")
    if isinstance(profiles, AsSet):
        return profiles
    if profiles is None or isinstance(profiles, str) or not isinstance(profiles, Sequence):
        return [profiles] * len(prompts)
    if len(profiles) != len(prompts):
        raise UsageError(
            f"{len(profiles)} profiles for {len(prompts)} prompts",
            where="profiles",
            mend="give one for each prompt (None is the base alone), or a single one for all",
        )
    return list(profiles)


def checked_prompts(prompts: Any) -> list[Prompt]:
    """Return the prompts as a list.

    Raises:
        UsageError: if they are no texts or chats.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Sequence) else None
    if listed is None and prompts is not None:
        raise UsageError(
            f"a {type(prompts).__name__} is no list of prompts",
            where="prompts",
            mend="give texts, or token ids as input_ids=...",
        )
    for prompt in listed or []:
        if isinstance(prompt, Mapping) or not isinstance(prompt, str | Sequence):
            raise UsageError(
                f"a prompt is a {type(prompt).__name__}",
                where="prompts",
                mend='give texts or chats; one chat is [[{"role": "user", "content": "..."}]]',
            )
        if isinstance(prompt, str):
            check_text(prompt, where="prompts")
    return listed or []


def sampled_answers(
    generator: Generator, prompts: Sequence[Prompt], profiles: Sequence[ProfileLike] | AsSet, mix: Mix, **sampling: Any
) -> list[str]:
    """Return an answer to each prompt, drawn by random numbers that depend on the seed and the prompt's place alone.

    `sampling` goes to Generator.answers.
    """

    @contextmanager
    def around(indices: Sequence[int]) -> Iterator[Within]:
        def width() -> int:
            longest = max(len(generator.encoded(prompts[index])) for index in indices)
            return longest + int(sampling["max_new_tokens"])

        own = profiles if isinstance(profiles, AsSet) else [profiles[index] for index in indices]
        with fitting_rows(generator.model, len(indices), width), mix(own, 1) as mixture:
            yield Within(processors_of(mixture))

    # rows that are set already stand in the caller's order
    in_order = isinstance(profiles, AsSet)
    return [answer for (answer,) in generator.answers(prompts, around=around, in_order=in_order, **sampling)]


def transformers_answers(
    generator: Generator,
    prompts: Sequence[Prompt],
    profiles: Sequence[ProfileLike] | AsSet,
    mix: Mix,
    *,
    max_new_tokens: int | None,
    batch_size: int,
    seed: int,
    options: Mapping[str, Any],
) -> list[str]:
    """Return the answers that transformers' generate gives with `options`: n for each prompt, one after another.

    Its own sampling draws from torch's generators, which are set by `seed` for it and put back.
    """
    from transformers import GenerationConfig

    model = generator.model
    options = {name: value for name, value in options.items() if name != "generation_config" or value is not None}
    given = options.get("generation_config") or GenerationConfig()
    usual: dict[str, Any] = {"generation_config": given}
    if given.eos_token_id is None:
        usual["eos_token_id"] = sorted(generator.stop_ids)
    if given.pad_token_id is None:
        usual["pad_token_id"] = generator.pad_id
    is_cut = any((options.get(name) or getattr(given, name)) is not None for name in ("max_length", "max_new_tokens"))
    if max_new_tokens is not None or not is_cut:
        usual["max_new_tokens"] = max_new_tokens or 256
    rows_each = rows_for_each(options, given)
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        asked = slice(start, start + batch_size)
        encoded = [generator.encoded(prompt) for prompt in prompts[asked]]
        ids_BT, mask_BT = pad_left(encoded, generator.pad_id, model.device)
        own = profiles if isinstance(profiles, AsSet) else profiles[asked]
        width = partial(int, ids_BT.shape[1] + (max_new_tokens or given.max_new_tokens or 256))
        # what changes the model or torch's generators comes last: other threads wait for the mixture
        with (
            fitting_rows(model, len(encoded), width, rows_each=rows_each),
            mix(own, rows_each) as mixture,
            seeded(model, seed + (start << 32)),
            generator.forgetting_own_generation(),
            quiet_transformers(),
        ):
            out = generate_tokens(model, mixture, {"input_ids": ids_BT, "attention_mask": mask_BT, **usual, **options})
        tokens = out if isinstance(out, torch.Tensor) else out.sequences
        found += [generator.text(row) for row in tokens[:, ids_BT.shape[1] :].tolist()]
    return found


def generate_tokens(model: Any, mixture: Mixture | None, options: Mapping[str, Any]) -> Any:
    """Return what the model's own generate returns, its schedules' steps taken.

    Raises:
        UsageError: if a weight follows the tokens, and several of them are to be decoded at once.
    """
    several = [name for name in _SEVERAL_TOKENS if options.get(name) is not None]
    if several and mixture is not None and mixture.is_scheduled:
        raise UsageError(
            "a weight is a function of the token's number, and several tokens are decoded at once",
            where=several[0],
            mend="leave it out, or give weights that are numbers",
        )
    processors = [*(options.get("logits_processor") or []), *processors_of(mixture)]
    with torch.no_grad():
        return model.generate(**{**options, "logits_processor": processors})


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Let torch's generators, from which transformers samples, begin at `seed`; they are put back afterwards."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def processors_of(mixture: Mixture | None) -> list[NextStep]:
    """Return the logits processors that an answer needs, and begin its schedules: the prompt is read at step 0."""
    if mixture is None or not mixture.is_scheduled:
        return []
    mixture.step(0)
    return [NextStep(mixture)]


def check_one_row(mixture: Mixture) -> None:
    """Raise unless a mixture is still set, and can be that of one prompt.

    Raises:
        UsageError: saying which of the two it is not.
    """
    if mixture.is_innermost() is None:
        raise UsageError(
            "the mixture in which the stream was asked for has ended",
            where="mixture",
            mend="read the stream within the block, or give it a profile of its own",
        )
    if len(mixture.rows) != 1:
        raise UsageError(
            f"a stream is one row, the mixture that is set has {len(mixture.rows)}",
            where="mixture",
            mend="give the stream a profile of its own, outside of the mixture",
        )


def rows_for_each(options: Mapping[str, Any], config: Any) -> int:
    """Return how many rows transformers makes of each prompt: beams, or the answers that are sampled side by side.

    `config` is the generation config that holds where `options` say nothing.
    """

    def asked(name: str) -> int:
        return int(options.get(name) or getattr(config, name, None) or 1)

    beams = asked("num_beams")
    return beams if beams > 1 else asked("num_return_sequences")
