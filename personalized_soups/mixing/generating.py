"""Generate answers within mixtures, with our own sampling or with transformers' generate and its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from personalized_soups.declare.expert_weights import ExpertWeights, ProfileLike
from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator, Within
from personalized_soups.generation.prompts import Prompt
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.generation.sampling import pad_left
from personalized_soups.generation.soft_tokens import checked_soft_tokens
from personalized_soups.mixing.active_mixture import ActiveMixture, Mixture, NextStep
from personalized_soups.mixing.batch_rows import AsSet, checked_prompts, profile_per_prompt, rows_per_prompt
from personalized_soups.mixing.fitting import fitting_rows
from personalized_soups.mixing.log_prob_mixing import MixedLogProbs, group_size_of
from personalized_soups.mixing.prefixes import PrefixCache, new_past
from personalized_soups.mixing.profile_registry import ProfileRegistry

# Options of transformers' generate with which one forward pass computes several tokens. A schedule has a different
# weight for each of these tokens, but a forward pass has one weight.
_SEVERAL_TOKENS = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")

_MAX_NEW_TOKENS = 256


class MixedGeneration:
    """Answers prompts, each with its own profile.

    Args:
        model: the transformers model, with wrapped layers.
        active: sets the mixtures.
        registry: resolves profiles into weights.
        cache_key: a function that returns, for scaled weights, the key under which a prompt's keys and values may be
            cached.
        generator: a function that returns the model's Generator. It raises UsageError if the model has no tokenizer.
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
        soft_tokens: Sequence[Tensor | None] | None,
        log_prob_weights: Sequence[float] | None,
        options: Mapping[str, Any],
    ) -> Any:
        """Answer prompts or token ids. Arguments, result and errors are those of `SoupModel.generate`."""
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UsageError(
                f"max_new_tokens is {max_new_tokens}, but must be at least 1",
                where="max_new_tokens",
                mend="give a number of 1 or more, such as max_new_tokens=256",
            )
        if not 0 <= temperature < math.inf:
            raise UsageError(
                f"temperature is {temperature}, but must be a finite number of 0 or more",
                where="temperature",
                mend="give a temperature such as 0.7, or 0 for the most likely tokens",
            )
        # transformers samples only if do_sample is true. Our own sampling needs only the temperature.
        if temperature and (options or prompts is None):
            options = {"do_sample": True, "temperature": temperature, **options}
        if places is not None and options:
            what = "places has no effect on transformers' generate, but options of transformers' generate are given"
            raise UsageError(what, where="places", mend=f"leave out places, or leave out {', '.join(options)}")
        if soft_tokens is not None and options:
            what = "soft_tokens cannot be combined with options of transformers' generate, but such options are given"
            raise UsageError(
                what, where="soft_tokens", mend=f"leave out soft_tokens, or leave out {', '.join(options)}"
            )
        if log_prob_weights is not None and options:
            what = "log_prob_weights cannot be combined with options of transformers' generate, but some are given"
            raise UsageError(
                what, where="log_prob_weights", mend=f"leave out log_prob_weights, or leave out {', '.join(options)}"
            )
        if "input_ids" in options or "inputs_embeds" in options:
            if prompts is not None:
                raise UsageError(
                    "prompts and token ids (input_ids or inputs_embeds) are both given, but only one can be used",
                    where="prompts",
                    mend="leave out prompts, or leave out input_ids and inputs_embeds",
                )
            # Token ids are passed to transformers as they are, without a template, end tokens or a default length.
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
            soft_tokens=checked_soft_tokens(soft_tokens, len(checked), self._model),
            log_prob_weights=log_prob_weights,
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
        """Yield one answer piece by piece. Arguments and errors are those of `SoupModel.stream`."""
        if self._active.is_set_here and not isinstance(profile, AsSet):
            raise UsageError(
                "a profile is given, but the stream would wait forever for the mixture that this thread has set",
                where="profile",
                mend="leave out the profile to stream with that mixture, or call stream after the `with` block",
            )
        generator = self._generator()
        tokens = generator.encoded(prompt)
        # A second thread generates. It must not wait for the mixture that this thread has set.
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
        """Set a mixture of `profiles` within a block. If `profiles` is AS_SET, keep the weights that are set."""
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
        self,
        prompts: Sequence[Prompt],
        profiles: Sequence[ProfileLike] | AsSet,
        *,
        soft_tokens: Sequence[Tensor | None],
        log_prob_weights: Sequence[float] | None,
        **sampling: Any,
    ) -> list[str]:
        """Return one answer for each prompt. Its random numbers depend only on the seed and the prompt's place.

        `sampling` are further arguments of `Generator.answers`.
        """
        generator = self._generator()
        num_soft = [0 if own is None else len(own) for own in soft_tokens]
        for prompt, count in zip(prompts, num_soft, strict=True):
            if count:
                generator.encoded(prompt, num_soft=count)  # raises if soft tokens and prompt are too long together

        size = 0
        if log_prob_weights is not None:
            size = group_size_of(sampling["places"], log_prob_weights, len(prompts))
            sampling["batch_size"] = max(1, sampling["batch_size"] // size) * size  # no batch divides a group

        def processors(mixture: Mixture | None, indices: Sequence[int]) -> list[Any]:
            if log_prob_weights is None:
                return [*_started(mixture)]
            weights_B = torch.tensor([log_prob_weights[index] for index in indices], device=self._model.device)
            return [*_started(mixture), MixedLogProbs(weights_B, size)]

        @contextmanager
        def around(indices: Sequence[int]) -> Iterator[Within]:
            def width() -> int:
                longest = max(len(generator.encoded(prompts[index])) + num_soft[index] for index in indices)
                return longest + int(sampling["max_new_tokens"])

            own = profiles if isinstance(profiles, AsSet) else [profiles[index] for index in indices]
            # `fitting_rows` is the outermost context, because it measures after the mixture has ended.
            with fitting_rows(generator.model, len(indices), width), self._mixture(own, 1) as mixture:
                own_tokens = [soft_tokens[index] for index in indices]
                yield Within(processors(mixture, indices), soft_tokens=own_tokens)

        # With a mixture that is set already, the prompts must keep the order of its rows, so they are not sorted by
        # length. Neither are groups, whose rows must stay together.
        in_order = isinstance(profiles, AsSet) or log_prob_weights is not None
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
        """Return the answers of transformers' generate with `options`, in the order of the prompts.

        With `num_return_sequences=n`, each prompt has n answers. transformers samples with torch's random generators,
        which are seeded for this call and get their old state back.
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
            # The mixture's lock is taken before the contexts that change the model's config or torch's generators, so
            # that no other thread sees these changes. The shift gives each batch its own seed, because no two batches
            # have the same start.
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
    """Return the result of the model's own generate, while the mixture's schedules advance with each token.

    Raises:
        UsageError: if the mixture has a schedule, but an option decodes several tokens in one forward pass.
    """
    several = [name for name in _SEVERAL_TOKENS if options.get(name) is not None]
    if several and mixture is not None and mixture.is_scheduled:
        raise UsageError(
            f"a weight is a function of the token's number, but with {several[0]} several tokens are decoded at once",
            where=several[0],
            mend=f"leave {several[0]} out, or give weights that are numbers",
        )
    processors = [*(options.get("logits_processor") or []), *_started(mixture)]
    with torch.no_grad():
        return model.generate(**{**options, "logits_processor": processors})


@contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    """Seed torch's random generators, with which transformers samples, within the block. Restore them afterwards."""
    # Only the model's device is given, because fork_rng warns if there are many GPUs.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _started(mixture: Mixture | None) -> list[NextStep]:
    return [] if mixture is None else mixture.start()


def _check_one_row(mixture: Mixture) -> None:
    """Raise UsageError if the mixture has ended or has more than one row."""
    # A stream starts when its first piece is read, which may be after the `with` block.
    if mixture.is_innermost() is None:
        raise UsageError(
            "the stream was made within a mixture, but the mixture has ended",
            where="mixture",
            mend="read the stream within the `with` block, or make it outside: stream(prompt, profile)",
        )
    if len(mixture.rows) != 1:
        raise UsageError(
            f"a stream needs a mixture with one profile, but the mixture that is set has {len(mixture.rows)} profiles",
            where="mixture",
            mend="leave the `with` block, and give the stream its own profile: stream(prompt, profile)",
        )
