"""SoupModel: a causal language model of transformers that answers every row of a batch with a soup of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch import Tensor

from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.declare.expert_weights import ExpertWeights, LayerWeights, ProfileLike
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator, Within
from personalized_soups.generation.loading import Dtype, choose_device, load_base, load_tokenizer
from personalized_soups.generation.prompts import Prompt
from personalized_soups.mixing.active_mixture import ActiveMixture, Mixture
from personalized_soups.mixing.experts import check_known_base
from personalized_soups.mixing.generating import (
    AS_SET,
    AsSet,
    check_one_row,
    checked_prompts,
    generate_tokens,
    one_for_each,
    processors_of,
    rows_for_each,
    sampled_answers,
    seeded,
    transformers_answers,
)
from personalized_soups.mixing.layers import MixedLayers
from personalized_soups.mixing.prefixes import PrefixCache, new_past
from personalized_soups.mixing.profile_registry import Names, ProfileRegistry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Experts: TypeAlias = ExpertLibrary | Path | str | Sequence[Path | str]

# Calls of a module that return it; through SoupModel they return the SoupModel.
_RETURNING_SELF = frozenset({
    "to", "cpu", "cuda", "half", "float", "double", "bfloat16", "eval", "train", "requires_grad_",
})  # fmt: skip


class SoupModel:
    """One base in memory, and any number of users: a soup is a few numbers, set for each row of a batch.

    `model` is the transformers model itself; its adapted linear layers hold the stacked factors of all experts. Within
    `mixture(profiles)` every row of a batch has its own soup, whatever transformers does with it; outside it the model
    is the bare base, to the bit, or what `set_adapters` asked for. What SoupModel lacks is taken from `model`.

    One mixture is set at a time: another thread's waits for it to end, and so do changes of the experts, so that a
    batch sees one version of everything. A forward pass that meanwhile runs on a thread of its own, as streamers have
    it, sees the mixture that is set.

    Args:
        model: the base, loaded.
        experts: their library, or its folder, or several folders; all of them are held.
        tokenizer: of the base; needed for prompts that are text.
        base: the folder or hub id that the model was loaded from: experts that record another one's fingerprint are
            refused.
        same_base: take it that the experts were trained on this base, whatever names and fingerprints say.

    Raises:
        SoupError: if an expert is damaged, of a kind that cannot be mixed, or of another base.
    """

    def __init__(
        self,
        model: Any,
        experts: Experts,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        base: Path | str | None = None,
        same_base: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._base = base
        self._same_base = same_base
        self._held = MixedLayers(model)
        self._registry = ProfileRegistry()
        self._active = ActiveMixture(self._held, self._registry.scaled)
        self._change(list(_library(experts).values()))

    @classmethod
    def from_pretrained(
        cls,
        base: Path | str,
        experts: Experts,
        *,
        device: str = "auto",
        dtype: Dtype = "float32",
        same_base: bool = False,
        **options: Any,
    ) -> Self:
        """Load a base and its experts.

        Args:
            base: a folder or a hub id.
            experts: their library, or its folder, or several folders.
            device: auto (CUDA where there is one), cpu, cuda, ...
            dtype: in which base and factors are held and compute.
            same_base: take it that this is the experts' base, whatever names and fingerprints say.
            options: further ones of transformers' from_pretrained: attn_implementation, quantization_config, ...

        Raises:
            SoupError: if base, experts or device are not there or not usable, or do not belong together.
        """
        library = _library(experts)
        chosen = choose_device(device)
        tokenizer = load_tokenizer(base)
        # what the hub holds has no fingerprint before it is downloaded: then the model's own check comes after
        if not same_base and Path(base).is_dir():
            check_known_base(list(library.values()), base)
        model = load_base(base, device=chosen, dtype=dtype, **options).eval()
        return cls(model, library, tokenizer=tokenizer, base=base, same_base=same_base)

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The experts by name, sorted."""
        return self._held.experts

    @property
    def profiles(self) -> Mapping[str, ExpertWeights]:
        """The weights that names stand for, some hundred bytes each; add_profile and remove_profile change them."""
        return self._registry.profiles

    @property
    def layers(self) -> MixedLayers:
        """The layers that hold the experts' stacks."""
        return self._held

    def __repr__(self) -> str:
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        return (
            f"SoupModel({name}, experts: {', '.join(self.experts) or 'none'}, {self.model.dtype}, {self.model.device})"
        )

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the model's forward; within `mixture` every row with its own soup."""
        return self.model(*arguments, **keywords)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # before there is one
            raise AttributeError(name)
        found = getattr(self.model, name)
        if name not in _RETURNING_SELF:
            return found

        def and_this(*arguments: Any, **keywords: Any) -> SoupModel:
            found(*arguments, **keywords)
            return self

        return and_this

    @contextmanager
    def mixture(
        self, profiles: ProfileLike | Sequence[ProfileLike], *, rows: Tensor | None = None, rows_each: int = 1
    ) -> Iterator[Mixture]:
        """Set the soups of a batch for everything that the model does within the block.

        Args:
            profiles: one for each row of the batch, or a single one for all rows. Each is a Profile, a dict of weights,
                a name (of a profile that was added, or of an expert), or None for the base alone. A dict's weight may
                differ by layer (`{"*.mlp.*": 0.5}`) or be a function of the generated token's number.
            rows: of packed sequences, int64 `[B, T]`: for each token of the batch, which of `profiles` it belongs to.
            rows_each: rows of the batch that each profile has, one after another: beams, or several answers a prompt.

        Yields:
            The mixture; its `step` moves schedules on, where the caller generates by forwards of its own.

        Raises:
            DeclarationError: if a profile names unknown experts or opposed sides, or a weight is no finite number.
            UsageError: if there are no profiles, a name is unknown, or a profile asks for what is no mixture.
        """
        is_single = profiles is None or isinstance(profiles, str | Profile | Mapping | ExpertWeights)
        listed: list[ProfileLike] = [profiles] if is_single else list(profiles)  # type: ignore[arg-type, list-item]
        with self._active.mixture(
            lambda: [self._row(who) for who in listed],
            token_rows=rows,
            rows_each=None if is_single and rows is None else rows_each,
        ) as mixture:
            yield mixture

    def generate(
        self,
        prompts: str | Sequence[Prompt] | None = None,
        profiles: ProfileLike | Sequence[ProfileLike] | AsSet = AS_SET,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        places: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Answer every prompt with its own soup, as many in a batch as `batch_size`.

        Args:
            prompts: a text, or a list of texts and chats (lists of messages); none with `input_ids`.
            profiles: one for each prompt, or a single one for all, as `mixture` takes them; where left out, what is set
                (or served) already.
            max_new_tokens: an answer is cut there; 256 where left out (of `input_ids`, as the model's own generate).
            temperature: 0 takes the likeliest token; else a draw that depends on seed and the prompt's place alone. Of
                `input_ids` the model's own generation config counts where nothing is said.
            seed: of the draws.
            batch_size: prompts at once.
            places: where these prompts are a part of more, their places in the whole; equal places draw alike.
            options: any of transformers' generate: num_beams, do_sample, top_p, num_return_sequences, streamer,
                cache_implementation, ... Its own sampling takes the place of ours.

        Returns:
            A text for each prompt (for `num_return_sequences=n` n, one after another); of `input_ids` what transformers
            returns.

        Raises:
            UsageError: if there are no prompts, or not as many profiles; and as `mixture`.
            RunError: if a batch does not fit on the GPU: it says which would.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}", where="max_new_tokens", mend="give 1 or more")
        if not 0 <= temperature < math.inf:
            raise UsageError(f"the temperature is {temperature}", where="temperature", mend="give 0 or more")
        if temperature and (options or prompts is None):
            options = {"do_sample": True, "temperature": temperature, **options}
        if places is not None and options:
            raise UsageError(
                "places are of our own draws", where="places", mend="leave them out with options of transformers"
            )
        if "input_ids" in options or "inputs_embeds" in options:
            given: Any = options.get("input_ids", options.get("inputs_embeds"))
            if prompts is not None:
                raise UsageError("prompts and input_ids are both given", where="prompts", mend="give one of the two")
            if max_new_tokens is not None:
                options["max_new_tokens"] = max_new_tokens
            wanted = one_for_each(list(given), profiles)
            config = options.get("generation_config") or self.model.generation_config
            with self._mix(wanted, rows_for_each(options, config)) as mixture, seeded(self.model, seed):
                return generate_tokens(self.model, mixture, options)
        asked = checked_prompts(prompts)
        wanted = one_for_each(asked, profiles)
        if options:
            return transformers_answers(
                self.generator,
                asked,
                wanted,
                self._mix,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                seed=seed,
                options=options,
            )
        return sampled_answers(
            self.generator,
            asked,
            wanted,
            self._mix,
            max_new_tokens=256 if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            greedy=temperature == 0,
            batch_size=batch_size,
            seed=seed,
            places=places,
        )

    def stream(
        self,
        prompt: Prompt,
        profile: ProfileLike | AsSet = AS_SET,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        prefixes: PrefixCache | None = None,
    ) -> Iterator[str]:
        """Yield one answer piece by piece, while it is generated on a thread of its own, which sets the mixture.

        Args:
            prompt: a text, or a chat as a list of messages.
            profile: who it is for, as `mixture` takes it; where left out, what is set (or served) already.
            max_new_tokens, temperature, seed: as in `generate`.
            prefixes: what earlier prompts of the same soup left is not read again, and this one is left for the next:
                for chats, whose prompts begin alike.
        """
        if self._active.is_set_here and not isinstance(profile, AsSet):
            raise UsageError(
                "a mixture is set, and the stream's own would wait for its end",
                where="profile",
                mend="leave the profile out to stream what is set, or leave the mixture first (as for the base alone)",
            )
        tokens = self.generator.encoded(prompt)
        # what this thread has set it keeps set: the thread that generates has not to wait for it
        own = self._active.innermost if self._active.is_set_here else None

        @contextmanager
        def around(_: Sequence[int]) -> Iterator[Within]:
            wanted = profile if isinstance(profile, AsSet) else [profile]
            with self._mix(wanted, 1) if own is None else nullcontext(own) as mixture:
                if mixture is not None:
                    check_one_row(mixture)
                if prefixes is None:
                    yield Within(processors_of(mixture))
                    return
                row = self._registry.scaled(self._active.served) if mixture is None else mixture.rows[0]
                version = self._held.cache_key_of(row)
                prefix = prefixes.longest(version, tokens)
                past = new_past(self.model) if prefix is None else prefix.past
                yield Within(processors_of(mixture), past)
                prefixes.put(version, tokens, past)

        return self.generator.stream(
            prompt,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            greedy=temperature == 0,
            around=around,
        )

    def resolve(self, profile: ProfileLike) -> ExpertWeights:
        """Return somebody's weights, checked: what `mixture` takes as well, and need not look up again.

        It does not wait for a mixture that another thread has set.

        Raises:
            DeclarationError, UsageError: as `mixture` would for this row.
        """
        row = self._registry.resolve(profile)
        self._active.check(self._registry.scaled(row))
        return row

    def cache_key(self, profile: ProfileLike) -> str:
        """Return what a cache of keys and values is known by: it changes with the weights and with the experts.

        Two prompts' caches may be exchanged where tokens and versions are equal. Of a schedule it tells step 0, with
        which the prompt is read.
        """
        with self._active.lock:
            return self._held.cache_key_of(self._row(profile))

    def add_profile(self, profile: Profile, name: str | None = None) -> None:
        """Let a name (the profile's user where none is given) stand for a profile; it may replace another.

        Batches that run keep what they began with.

        Raises:
            DeclarationError, UsageError: as `mixture`.
        """
        if not isinstance(profile, Profile):
            raise UsageError(
                f"a {type(profile).__name__} is no Profile",
                where="profile",
                mend="give Profile(user='u1042', weights={...})",
            )
        with self._active.lock:
            self._registry.add(profile, name or profile.user)

    def remove_profile(self, name: str) -> None:
        """Forget a profile.

        Raises:
            UsageError: if nobody is called so.
        """
        with self._active.lock:
            self._registry.remove(name)

    def add_expert(self, expert: Expert | Path | str, name: str | None = None) -> str:
        """Hold one more expert, or another one in place of that of its name, and return the name.

        Args:
            expert: opened, or its folder.
            name: what it shall be called; its folder's name where left out.

        Raises:
            SoupError: if it is damaged, of a kind that cannot be mixed, or of another base; nothing has changed then.
            UsageError: within a mixture of this thread's.
        """
        if not isinstance(expert, Expert):
            (expert,) = ExpertLibrary.open(_adapter(expert)).values()
        found = expert if name is None else Expert(name, expert.folder)
        self._change([found])
        return found.name

    def remove_expert(self, name: str) -> None:
        """Let go of an expert and its memory. Profiles that name it are refused from now on.

        Raises:
            UsageError: if there is no such expert; within a mixture of this thread's.
        """
        with self._active.lock:
            self._registry.check_expert(name)
            self._change([], [name])

    def change_experts(self, added: Sequence[Expert], removed: Sequence[str] = ()) -> None:
        """Take several experts in and out at once, all or nothing; one that is added replaces that of its name.

        Raises:
            SoupError: as add_expert and remove_expert; nothing has changed then.
        """
        with self._active.lock:
            for name in removed:
                self._registry.check_expert(name)
            self._change(list(added), list(removed))

    def serve(self, profile: ProfileLike) -> None:
        """Serve all rows with a profile where no mixture is set; None makes that the bare base again.

        Raises:
            DeclarationError, UsageError: as `mixture`.
        """
        with self._active.lock:
            self._active.serve(self._registry.resolve(profile))

    def set_adapters(self, names: Names, weights: float | LayerWeights | Sequence[float | LayerWeights] = 1.0) -> None:
        """Serve all rows with these experts where no mixture is set: diffusers' call, with its meaning of weights.

        Args:
            names: of experts, or of one.
            weights: one for all, or one for each; by layer as in `mixture`.

        Raises:
            UsageError: if an expert is unknown, or there are not as many weights as names.
        """
        with self._active.lock:
            self._active.serve(self._registry.resolve_adapters(names, weights))

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply an expert's weight by `scale` wherever it is used from now on; 1 undoes it.

        Raises:
            UsageError: if there is no such expert.
            DeclarationError: if the scale is no finite number.
        """
        with self._active.lock:
            self._registry.set_scale(name, scale)
            self._held.restamp(name)
            self._active.settle()

    def get_active_adapters(self) -> list[str]:
        """Return the experts that serve where no mixture is set."""
        return list(self._active.served.weights)

    @property
    def served(self) -> ExpertWeights:
        """The weights that serve where no mixture is set; none are the bare base."""
        return self._active.served

    def disable_adapters(self) -> None:
        """Be the bare base where no mixture is set, until enable_adapters or set_adapters."""
        self._active.enable(False)

    def enable_adapters(self) -> None:
        """Serve again what set_adapters asked for."""
        self._active.enable(True)

    def delete_adapters(self, names: Names) -> None:
        """Let go of experts: diffusers' name for remove_expert."""
        listed = [names] if isinstance(names, str) else list(names)
        with self._active.lock:
            for name in listed:
                self._registry.check_expert(name)
            self._change([], listed)

    def unload(self) -> Any:
        """Put the base's own layers back and return the model; the experts are gone."""
        self._change([], list(self.experts))
        return self.model

    @cached_property
    def generator(self) -> Generator:
        """What answers prompts that are text, by the base's chat template.

        Raises:
            UsageError: if the model came without a tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError(
                "prompts are text, and the model has no tokenizer",
                where="prompts",
                mend="make the SoupModel with tokenizer=..., or give input_ids",
            )
        return Generator(self.model, self.tokenizer)

    def _mix(self, profiles: Sequence[ProfileLike] | AsSet, rows_each: int) -> AbstractContextManager[Mixture | None]:
        """Set a mixture, or leave what is set as it is."""
        if isinstance(profiles, AsSet):
            return self._active.as_set()
        return self.mixture(list(profiles), rows_each=rows_each)

    def _row(self, who: ProfileLike) -> ExpertWeights:
        return self._registry.scaled(self._registry.resolve(who))

    def _change(self, added: Sequence[Expert], removed: Sequence[str] = ()) -> None:
        with self._active.lock:
            if self._active.innermost is not None:
                raise UsageError(
                    "experts cannot change while a mixture is set",
                    where="mixture",
                    mend="leave the block first; other threads wait for it by themselves",
                )
            self._registry.check_new([expert.name for expert in added])
            if self._base is not None and not self._same_base:
                check_known_base(added, self._base)
            try:
                # a buffer that was made in inference mode could not be changed outside of it
                with torch.inference_mode(False), torch.no_grad():
                    self._held.change(added, removed, same_base=self._same_base)
            finally:  # experts may have changed and a warning of it have become an error
                self._registry.put(self.experts)
                self._active.forget(self.experts)


def _library(experts: Experts) -> ExpertLibrary:
    if isinstance(experts, ExpertLibrary):
        return experts
    return ExpertLibrary.open(*([experts] if isinstance(experts, Path | str) else experts))


def _adapter(folder: Path | str) -> Path:
    """Return the folder of one adapter.

    Raises:
        UsageError: if it is a folder of several.
    """
    if len(ExpertLibrary.open(folder)) != 1:
        raise UsageError(f"there are several experts in {folder}", where="expert", mend="add them one by one")
    return Path(folder)
