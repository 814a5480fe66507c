"""Answers of a model within mixtures: by our own sampling, or by any option of transformers' generate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from personalized_soups.declare.expert_weights import ExpertWeights, ProfileLike
from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator, Within
from personalized_soups.generation.prompts import Prompt
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.generation.sampling import pad_left
from personalized_soups.mixing.active_mixture import ActiveMixture, Mixture, NextStep
from personalized_soups.mixing.batch_rows import AsSet, checked_prompts, profile_per_prompt, rows_per_prompt
from personalized_soups.mixing.fitting import fitting_rows
from personalized_soups.mixing.prefixes import PrefixCache, new_past
from personalized_soups.mixing.profile_registry import ProfileRegistry

# Decoding that asks for the logits of several tokens at once. A schedule has no single weight for those tokens.
_SEVERAL_TOKENS = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")

_MAX_NEW_TOKENS = 256


class MixedGeneration:
    """Answers prompts, each with its own profile.

    Args:
        model: the transformers model, its layers mixed.
        active: sets the mixtures.
        registry: resolves profiles.
        cache_key: returns the key under which a prompt's keys and values may be cached, for scaled weights.
        generator: returns the model's Generator; raises UsageError for a model without a tokenizer.
    """

    def __init__(
        self,
        model: Any,
        active: ActiveMixture,
        registry: ProfileRegistry,
        *,
        cache_key: Callable[[ExpertWeights], str],
        generator: Callable[[], Generator],
    ) -> None:
        self._model = model
        self._active = active
        self._registry = registry
        self._cache_key = cache_key
        self._generator = generator

    def generate(
        self,
        prompts: str | Sequence[Prompt] | None,
        profiles: ProfileLike | Sequence[ProfileLike] | AsSet,
        *,
        max_new_tokens: int | None,
        temperature: float,
        seed: int,
        batch_size: int,
        places: Sequence[int] | None,
        options: Mapping[str, Any],
    ) -> Any:
        """Answer prompts or token ids; arguments, result and errors are those of `SoupModel.generate`."""
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}", where="max_new_tokens", mend="give 1 or more")
        if not 0 <= temperature < math.inf:
            raise UsageError(f"temperature is {temperature}", where="temperature", mend="give 0 or more")
        # transformers samples only with do_sample; our own sampling needs the temperature alone.
        if temperature and (options or prompts is None):
            options = {"do_sample": True, "temperature": temperature, **options}
        if places is not None and options:
            what = "places cannot be combined with options of transformers' generate, which has its own sampling"
            raise UsageError(what, where="places", mend=f"leave out places, or {', '.join(options)}")
        if "input_ids" in options or "inputs_embeds" in options:
            if prompts is not None:
                raise UsageError("prompts and input_ids are both given", where="prompts", mend="give one of the two")
            # Token ids go to transformers as they are: no template, no end tokens, no default length.
            return self._continue_tokens(profiles, max_new_tokens, seed, dict(options))
        checked = checked_prompts(prompts)
        per_prompt = profile_per_prompt(checked, profiles)
        if options:
            return self._answer_by_transformers(
                checked, per_prompt, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, options=options
            )
        return self._sample_answers(
            checked,
            per_prompt,
            max_new_tokens=_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            greedy=temperature == 0,
            batch_size=batch_size,
            seed=seed,
            places=places,
        )

    def stream(
        self,
        prompt: Prompt,
        profile: ProfileLike | AsSet,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        prefixes: PrefixCache | None,
    ) -> Iterator[str]:
        """Yield one answer piece by piece; arguments and errors are those of `SoupModel.stream`."""
        if self._active.is_set_here and not isinstance(profile, AsSet):
            raise UsageError(
                "a stream with its own profile would wait for the mixture to end that this thread has set",
                where="profile",
                mend="leave the profile out to stream with the mixture that is set, or leave the mixture first",
            )
        generator = self._generator()
        tokens = generator.encoded(prompt)
        # Another thread generates. It must not wait for the mixture that this thread has set.
        own = self._active.innermost if self._active.is_set_here else None

        @contextmanager
        def around(_: Sequence[int]) -> Iterator[Within]:
            profiles = profile if isinstance(profile, AsSet) else [profile]
            with self._mixture(profiles, 1) if own is None else nullcontext(own) as mixture:
                if mixture is not None:
                    _check_one_row(mixture)
                if prefixes is None:
                    yield Within(_started(mixture))
                    return
                weights = self._active.idle_weights() if mixture is None else mixture.rows[0]
                key = self._cache_key(weights)
                prefix = prefixes.longest(key, tokens)
                past = new_past(self._model) if prefix is None else prefix.past
                yield Within(_started(mixture), past)
                prefixes.put(key, tokens, past)

        return generator.stream(
            prompt,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            greedy=temperature == 0,
            around=around,
        )

    def _mixture(
        self, profiles: Sequence[ProfileLike] | AsSet, rows_each: int
    ) -> AbstractContextManager[Mixture | None]:
        """Set a mixture, or keep the mixture that is set."""
        if isinstance(profiles, AsSet):
            return self._active.as_set()
        return self._active.mixture(
            lambda: [self._registry.resolve_scaled(profile) for profile in profiles],
            token_rows=None,
            rows_each=rows_each,
        )

    def _continue_tokens(
        self,
        profiles: ProfileLike | Sequence[ProfileLike] | AsSet,
        max_new_tokens: int | None,
        seed: int,
        options: dict[str, Any],
    ) -> Any:
        """Return the result of transformers' generate for `input_ids` or `inputs_embeds`."""
        inputs: Any = options.get("input_ids", options.get("inputs_embeds"))
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        per_prompt = profile_per_prompt(list(inputs), profiles)
        config = options.get("generation_config") or self._model.generation_config
        with self._mixture(per_prompt, rows_per_prompt(options, config)) as mixture, _seeded(self._model, seed):
            return _generate_tokens(self._model, mixture, options)

    def _sample_answers(
        self, prompts: Sequence[Prompt], profiles: Sequence[ProfileLike] | AsSet, **sampling: Any
    ) -> list[str]:
        """Return one answer for each prompt. Its random numbers depend on the seed and the prompt's place alone.

        `sampling` are keywords of `Generator.answers`.
        """
        generator = self._generator()

        @contextmanager
        def around(indices: Sequence[int]) -> Iterator[Within]:
            def width() -> int:
                longest = max(len(generator.encoded(prompts[index])) for index in indices)
                return longest + int(sampling["max_new_tokens"])

            own = profiles if isinstance(profiles, AsSet) else [profiles[index] for index in indices]
            # `fitting_rows` is outermost: it measures after the mixture has ended.
            with fitting_rows(generator.model, len(indices), width), self._mixture(own, 1) as mixture:
                yield Within(_started(mixture))

        # The rows of a mixture that is set already have the caller's order, so prompts are not sorted by length.
        in_order = isinstance(profiles, AsSet)
        return [answer for (answer,) in generator.answers(prompts, around=around, in_order=in_order, **sampling)]

    def _answer_by_transformers(
        self,
        prompts: Sequence[Prompt],
        profiles: Sequence[ProfileLike] | AsSet,
        *,
        max_new_tokens: int | None,
        batch_size: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> list[str]:
        """Return the answers of transformers' generate with `options`: n for each prompt, in the prompts' order.

        Its sampling draws from torch's generators. They are seeded for it, and get their old state back.
        """
        from transformers import GenerationConfig

        generator, model = self._generator(), self._model
        options = {name: value for name, value in options.items() if name != "generation_config" or value is not None}
        config = options.get("generation_config") or GenerationConfig()
        defaults: dict[str, Any] = {"generation_config": config}
        if config.eos_token_id is None:
            defaults["eos_token_id"] = sorted(generator.stop_ids)
        if config.pad_token_id is None:
            defaults["pad_token_id"] = generator.pad_id
        lengths = ("max_length", "max_new_tokens")
        is_limited = any((options.get(name) or getattr(config, name)) is not None for name in lengths)
        if max_new_tokens is not None or not is_limited:
            defaults["max_new_tokens"] = max_new_tokens or _MAX_NEW_TOKENS
        rows_each = rows_per_prompt(options, config)
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            encoded = [generator.encoded(prompt) for prompt in prompts[batch]]
            ids_BT, mask_BT = pad_left(encoded, generator.pad_id, model.device)
            own = profiles if isinstance(profiles, AsSet) else profiles[batch]
            width = partial(int, ids_BT.shape[1] + (max_new_tokens or config.max_new_tokens or _MAX_NEW_TOKENS))
            # The mixture's lock comes before the contexts that change the model or torch's generators, so that another
            # thread sees neither. The shift gives each batch its own seed: no two batches start at equal places.
            with (
                fitting_rows(model, len(encoded), width, rows_each=rows_each),
                self._mixture(own, rows_each) as mixture,
                _seeded(model, seed + (start << 32)),
                generator.own_config.set_aside(),
                quiet_transformers(),
            ):
                inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
                out = _generate_tokens(model, mixture, {**inputs, **defaults, **options})
            tokens = out if isinstance(out, torch.Tensor) else out.sequences
            answers += [generator.text(row) for row in tokens[:, ids_BT.shape[1] :].tolist()]
        return answers


def _generate_tokens(model: Any, mixture: Mixture | None, options: Mapping[str, Any]) -> Any:
    """Return the result of the model's own generate, while the mixture's schedules follow the tokens.

    Raises:
        UsageError: if a weight follows the tokens, and the options decode several tokens at once.
    """
    several = [name for name in _SEVERAL_TOKENS if options.get(name) is not None]
    if several and mixture is not None and mixture.is_scheduled:
        raise UsageError(
            "a weight is a function of the token's number, but several tokens are decoded at once",
            where=several[0],
            mend=f"leave {several[0]} out, or give weights that are numbers",
        )
    processors = [*(options.get("logits_processor") or []), *_started(mixture)]
    with torch.no_grad():
        return model.generate(**{**options, "logits_processor": processors})


@contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    """Seed torch's generators, from which transformers samples, within the block; restore them afterwards."""
    # Only the model's own device: fork_rng would warn of many GPUs otherwise.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _started(mixture: Mixture | None) -> list[NextStep]:
    return [] if mixture is None else mixture.start()


def _check_one_row(mixture: Mixture) -> None:
    """Raise UsageError unless the mixture is still set and is for one prompt."""
    # A stream starts with its first piece, which may be asked for after the `with` block.
    if mixture.is_innermost() is None:
        raise UsageError(
            "the mixture has ended that was set when the stream was made",
            where="mixture",
            mend="read the stream within the `with` block, or give it its own profile",
        )
    if len(mixture.rows) != 1:
        raise UsageError(
            f"a stream is one row, but the mixture that is set has {len(mixture.rows)} rows",
            where="mixture",
            mend="leave the mixture, and give the stream its own profile",
        )
