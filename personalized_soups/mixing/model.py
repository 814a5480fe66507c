"""SoupModel: a causal language model of transformers that answers each row of a batch with its own soup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from personalized_soups.declare.expert_weights import ExpertWeights, ProfileLike
from personalized_soups.declare.profile import Profile
from personalized_soups.devices import resolve_device
from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.loading import Dtype, load_base, load_tokenizer
from personalized_soups.generation.prompts import Prompt
from personalized_soups.mixing.active_mixture import ActiveMixture, Mixture
from personalized_soups.mixing.batch_rows import AS_SET, AsSet
from personalized_soups.mixing.generating import MixedGeneration
from personalized_soups.mixing.held_experts import Experts, HeldExperts, library_of
from personalized_soups.mixing.layers.experts import check_known_base
from personalized_soups.mixing.layers.mixed_layers import MixedLayers
from personalized_soups.mixing.named_profiles import NamedProfiles
from personalized_soups.mixing.prefixes import PrefixCache
from personalized_soups.mixing.profile_registry import ProfileRegistry
from personalized_soups.mixing.served_profile import ServedProfile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Methods of torch's modules that return the module. Through SoupModel they return the SoupModel.
_RETURNING_SELF = frozenset({
    "to", "cpu", "cuda", "half", "float", "double", "bfloat16", "eval", "train", "requires_grad_",
})  # fmt: skip


class SoupModel:
    """One base model and its experts in memory, for any number of users: each row of a batch has its own soup.

    The adapted linear layers of `model` hold the stacked factors of all experts. Within `mixture(profiles)` each row of
    a batch is computed with its own weights. Outside of a mixture the served profile answers; without one the model is
    the bare base, to the bit. Attributes that SoupModel lacks are those of `model`.

    One mixture is set at a time. Other threads' mixtures, and changes of experts and profiles, wait for it to end, so a
    batch sees one version of everything. A forward pass on a thread that has set no mixture (transformers' streamers
    need such a thread) uses the mixture that is set.

    Attributes:
        model: the transformers model.
        tokenizer: of the base; None if prompts are token ids only.
        experts: the experts by name, with `add`, `remove`, `change` and `set_scale` (a `HeldExperts`).
        profiles: the named profiles, with `add` and `remove` (a `NamedProfiles`).
        served: the profile that answers while no mixture is set, with `set`, `disable` and `enable`.
        layers: the layers that hold the experts' stacks.

    Args:
        model: a causal language model of transformers.
        experts: a library, its folder, or several folders.
        tokenizer: of the base; needed for prompts that are text.
        base: where the model was loaded from. Experts that record another base's fingerprint are rejected.
        same_base: accept any name and fingerprint of a base that the experts record.

    Raises:
        SoupError: if an expert is damaged, of a kind that cannot be mixed, or of another base.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> answers = model.generate(["How do I clean a lamp?"] * 2, [{"friendly": 0.6}, None], max_new_tokens=4)
        >>> len(answers)
        2
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
        self.layers = MixedLayers(model)
        self._registry = ProfileRegistry()
        # One lock for mixtures, experts, profiles and the served profile: no order of locks, so no deadlock.
        self._active = ActiveMixture(self.layers)
        self.served = ServedProfile(self._registry, self._active)
        self.profiles = NamedProfiles(self._registry, self._active.lock)
        parts = (self.layers, self._registry, self._active, self.served)
        self.experts = HeldExperts(*parts, base=base, same_base=same_base)
        self._generation = MixedGeneration(
            model, self._active, self._registry, cache_key=self.layers.cache_key, generator=lambda: self.generator
        )
        self.experts.change(list(library_of(experts).values()))

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
            experts: a library, its folder, or several folders.
            device: `auto` (CUDA if there is a CUDA device), `cpu`, `cuda`, ...
            dtype: of the base and of the experts' factors.
            same_base: accept any name and fingerprint of a base that the experts record.
            options: for transformers' from_pretrained: attn_implementation, quantization_config, ...

        Raises:
            SoupError: if the base, an expert or the device is missing or not usable, or an expert is of another base.
        """
        library = library_of(experts)
        chosen = resolve_device(device)
        tokenizer = load_tokenizer(base)
        # Checked before the slow load where it can be. A model of the hub has no fingerprint before its download.
        if not same_base and Path(base).is_dir():
            check_known_base(list(library.values()), base)
        model = load_base(base, device=chosen, dtype=dtype, **options).eval()
        return cls(model, library, tokenizer=tokenizer, base=base, same_base=same_base)

    @cached_property
    def generator(self) -> Generator:
        """The Generator that encodes prompts by the base's chat template, and samples.

        Raises:
            UsageError: if the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError(
                "prompts are text, but the model has no tokenizer",
                where="prompts",
                mend="make the SoupModel with tokenizer=..., or give token ids as input_ids=...",
            )
        return Generator(self.model, self.tokenizer)

    def __repr__(self) -> str:
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        experts = ", ".join(self.experts) or "none"
        return f"SoupModel({name}, experts: {experts}, {self.model.dtype}, {self.model.device})"

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the model's forward pass; within `mixture` each row has its own soup."""
        return self.model(*arguments, **keywords)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: copy and pickle look up attributes before __init__
            raise AttributeError(name)
        # `model.half()` must not return the bare transformers model: code that chains calls would lose the mixtures.
        attribute = getattr(self.model, name)
        if name not in _RETURNING_SELF:
            return attribute

        def returning_self(*arguments: Any, **keywords: Any) -> SoupModel:
            attribute(*arguments, **keywords)
            return self

        return returning_self

    @contextmanager
    def mixture(
        self, profiles: ProfileLike | Sequence[ProfileLike], *, rows: Tensor | None = None, rows_each: int = 1
    ) -> Iterator[Mixture]:
        """Set the profiles of a batch for all that the model computes within the block.

        Args:
            profiles: one for each row of the batch, or a single one for all rows. A profile is a Profile, a dict of
                weights, a name (of a named profile, or of an expert alone), or None for the base alone. In a dict, a
                weight may differ by layer (`{"*.mlp.*": 0.5}`) or be a function of the generated token's number.
            rows: for packed sequences, int64 `[B, T]`: the index in `profiles` for each token.
            rows_each: how many consecutive rows of the batch each profile has: beams, or several answers to a prompt.

        Yields:
            The mixture. Callers with schedules that run forward passes of their own call its `step`.

        Raises:
            DeclarationError: for an unknown expert, opposed sides, or a weight that is not a finite number.
            UsageError: for no profiles, an unknown name, or a profile with a method other than linear or with a rank.
        """
        # A dict is one profile, not a sequence of names; a str likewise.
        is_single = profiles is None or isinstance(profiles, str | Profile | Mapping | ExpertWeights)
        listed: list[ProfileLike] = [profiles] if is_single else list(profiles)  # type: ignore[arg-type, list-item]
        with self._active.mixture(
            # Resolved within the lock: profiles and experts may change until this thread has its turn.
            lambda: [self._registry.resolve_scaled(profile) for profile in listed],
            token_rows=rows,
            # A single profile is for any number of rows; with `rows`, each token names its own.
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
        """Answer each prompt with its own profile, `batch_size` prompts at a time.

        Args:
            prompts: a text, or a list of texts and chats (lists of messages); None with `input_ids`.
            profiles: one for each prompt, or a single one for all, as for `mixture`. If left out, the mixture that is
                set answers, or the served profile.
            max_new_tokens: the longest answer; 256 if left out. With `input_ids`, transformers' default.
            temperature: 0 takes the most likely token. Above 0, tokens are drawn; a draw depends on the seed and the
                prompt's place alone. With `input_ids`, the model's own generation config applies if this is left out.
            seed: of the draws.
            batch_size: prompts at a time.
            places: where the prompts are part of a longer list, their places in it. Equal places draw alike.
            options: of transformers' generate, which then also samples: num_beams, do_sample, top_p, streamer, ...

        Returns:
            One text for each prompt; n consecutive texts for each with `num_return_sequences=n`. With `input_ids`, the
            result of transformers' generate.

        Raises:
            DeclarationError, UsageError: as `mixture`. UsageError also if the numbers of prompts and profiles differ.
            RunError: if a batch does not fit on the GPU; the message gives the batch size that fits.
        """
        return self._generation.generate(
            prompts,
            profiles,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            places=places,
            options=options,
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
        """Yield one answer piece by piece, while another thread generates it within its own mixture.

        Args:
            prompt: a text, or a chat as a list of messages.
            profile: as for `mixture`. If left out, the mixture that is set answers, or the served profile.
            max_new_tokens: the longest answer.
            temperature, seed: as for `generate`.
            prefixes: a cache of keys and values. The beginning that this prompt shares with an earlier prompt of the
                same soup is not computed again: useful for chats, whose prompts begin alike.

        Raises:
            UsageError: if a profile is given within a mixture. Errors as of `generate` come with the first piece.
        """
        return self._generation.stream(
            prompt, profile, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, prefixes=prefixes
        )

    def resolve(self, profile: ProfileLike) -> ExpertWeights:
        """Return the checked weights of a profile. `mixture` takes them without checking them again.

        Does not wait for other threads' mixtures: a server resolves requests while a batch is running.

        Raises:
            DeclarationError, UsageError: as `mixture` would for this profile.
        """
        weights = self._registry.resolve(profile)
        self._active.check(self._registry.scaled(weights))
        return weights

    def cache_key(self, profile: ProfileLike) -> str:
        """Return the key under which a prompt's keys and values may be cached.

        It changes with the weights (of a schedule: those of step 0, which read the prompt), experts, dtype and model.
        """
        with self._active.lock:
            return self.layers.cache_key(self._registry.resolve_scaled(profile))

    def unload(self) -> Any:
        """Remove all experts, put the base's own layers back, and return the transformers model."""
        self.experts.change([], list(self.experts))
        return self.model
