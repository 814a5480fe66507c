"""SoupModel: a causal language model of transformers in which each row of a batch has its own soup.

A soup is the weighted sum of the experts' deltas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from personalized_soups.adapters.base_adapter import BaseAdapter, open_on
from personalized_soups.bases.place import place_of
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
from personalized_soups.mixing.layers.experts import check_known_adapter, check_known_base
from personalized_soups.mixing.layers.mixed_layers import MixedLayers
from personalized_soups.mixing.named_profiles import NamedProfiles
from personalized_soups.mixing.prefixes import PrefixCache
from personalized_soups.mixing.profile_registry import ProfileRegistry
from personalized_soups.mixing.served_profile import ServedProfile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Methods of torch's modules that return the module. Called on a SoupModel, they return the SoupModel.
_RETURNING_SELF = frozenset({
    "to", "cpu", "cuda", "half", "float", "double", "bfloat16", "eval", "train", "requires_grad_",
})  # fmt: skip


class SoupModel:
    """One base model and its experts in memory, for any number of users: each row of a batch has its own soup.

    A soup is the weighted sum of the experts' deltas. Each linear layer that experts adapt holds their LoRA factors.
    Within `mixture(profiles)`, the model computes each row of a batch with the weights of that row's profile. Outside
    of a mixture, the model uses the served profile for every row. If no profile is served, the outputs are bit for bit
    those of the bare base. An attribute that SoupModel does not define is looked up in `model`.

    Only one thread at a time can set mixtures. Other threads that set a mixture, or change experts or profiles, wait
    until that thread has left its mixtures. So experts and profiles stay the same during a batch. A forward pass on a
    thread that has set no mixture uses the mixture that another thread has set. Code with transformers' streamers
    relies on this, because it calls generate on a second thread.

    Attributes:
        model: the transformers model.
        tokenizer: the base's tokenizer; None if prompts are token ids only.
        experts: the experts by name. Change them with `add`, `remove`, `change` and `set_scale` of `HeldExperts`.
        profiles: the named profiles. Change them with `add` and `remove` of `NamedProfiles`.
        served: the profile that is used while no mixture is set. Change it with `set`, `disable` and `enable`.
        layers: the layers that hold the experts' factors.

    Args:
        model: a causal language model of transformers.
        experts: a library, its folder, or several folders.
        tokenizer: the base's tokenizer, needed for prompts that are text.
        base: the folder or hub id that `model` was loaded from. If `base` is given, an expert that records the
            fingerprint of another base is rejected.
        on: the adapter, such as an SFT adapter, that the weights of `model` include already: `from_pretrained` and
            PEFT's merge_and_unload add it. Experts that were trained on top of another adapter are rejected.
        same_base: accept the experts whatever base names and fingerprints they record.

    Raises:
        SoupError: if an expert is damaged, cannot be mixed, or was trained on another base.

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
        on: Path | str | BaseAdapter | None = None,
        same_base: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.layers = MixedLayers(model)
        self._registry = ProfileRegistry()
        # Mixtures, experts, profiles and the served profile share one lock. Several locks could deadlock.
        self._active = ActiveMixture(self.layers)
        self.served = ServedProfile(self._registry, self._active)
        self.profiles = NamedProfiles(self._registry, self._active.lock)
        given = BaseAdapter.open(on) if isinstance(on, Path | str) else on
        parts = (self.layers, self._registry, self._active, self.served)
        self.experts = HeldExperts(*parts, base=base, on=None if given is None else given.record, same_base=same_base)
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
        on: Path | str | None = None,
        device: str = "auto",
        dtype: Dtype = "float32",
        same_base: bool = False,
        **options: Any,
    ) -> Self:
        """Load a base and its experts.

        Args:
            base: the name of a named base (`tiny`, `smollm2`), a folder, a GGUF file or a hub id.
            experts: a library, its folder, or several folders.
            on: the folder of the LoRA adapter, such as an SFT adapter, on top of which the experts were trained. Its
                delta is added to the base's weights once, so every row has it, also a row with no profile.
            device: `auto` (CUDA if there is a CUDA device), `cpu`, `cuda`, ...
            dtype: the dtype of the base and of the experts' factors.
            same_base: accept the experts whatever base names and fingerprints they record.
            options: further arguments of transformers' from_pretrained: attn_implementation, quantization_config, ...

        Raises:
            SoupError: if the base, an adapter or the device is missing or unusable, or if an expert was trained on
                another base or on top of another adapter than `on`.
        """
        library = library_of(experts)
        chosen = resolve_device(device)
        base = place_of(base)
        tokenizer = load_tokenizer(base)
        # A local base is checked before it is loaded, because loading is slow. A model of the hub has no fingerprint
        # before its download.
        if not same_base and Path(base).is_dir():
            check_known_base(list(library.values()), base)
        base_adapter = open_on(on, same_base=same_base)
        check_known_adapter(list(library.values()), None if base_adapter is None else base_adapter.record)
        model = load_base(base, device=chosen, dtype=dtype, on=base_adapter, **options).eval()
        return cls(model, library, tokenizer=tokenizer, base=base, on=base_adapter, same_base=same_base)

    @cached_property
    def generator(self) -> Generator:
        """The Generator that encodes prompts with the base's chat template and samples answers.

        Raises:
            UsageError: if the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError(
                "the prompts are text, but the SoupModel has no tokenizer",
                where="prompts",
                mend="make the SoupModel with tokenizer=..., or give token ids as input_ids=...",
            )
        return Generator(self.model, self.tokenizer)

    def __repr__(self) -> str:
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        experts = ", ".join(self.experts) or "none"
        return f"SoupModel({name}, experts: {experts}, {self.model.dtype}, {self.model.device})"

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the model's forward pass. Within `mixture`, each row is computed with its own soup."""
        return self.model(*arguments, **keywords)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: copy and pickle look up attributes before __init__
            raise AttributeError(name)
        # `SoupModel.half()` must not return the transformers model, on which chained code would find no `mixture`.
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
        """Within the block, compute each row of a batch with the weights of its profile.

        Args:
            profiles: one profile for each row of the batch, or a single profile for all rows. A profile is a Profile, a
                dict of weights, a name, or None for the base alone. A name is that of a named profile, or of an expert,
                which then has weight 1. In a dict, a weight may differ by layer (`{"*.mlp.*": 0.5}`), or may be a
                function of the generated token's number (a schedule).
            rows: for packed sequences, an int64 tensor of the shape of `input_ids`: for each token, the index of its
                profile in `profiles`.
            rows_each: the number of consecutive rows of the batch that each profile is for, such as the beams of a
                prompt or several answers to it.

        Yields:
            The mixture. Callers that use schedules and run their own forward passes must call its `step`.

        Raises:
            DeclarationError: if an expert is unknown, sides are opposed, or a weight is not a finite number.
            UsageError: if there are no profiles, a name is unknown, or a profile has a rank or a method other than
                linear.
        """
        # A dict or a str is one profile, not a sequence of names.
        is_single = profiles is None or isinstance(profiles, str | Profile | Mapping | ExpertWeights)
        listed: list[ProfileLike] = [profiles] if is_single else list(profiles)  # type: ignore[arg-type, list-item]
        with self._active.mixture(
            # Profiles are resolved within the lock, because they and the experts may change while this thread waits.
            lambda: [self._registry.resolve_scaled(profile) for profile in listed],
            token_rows=rows,
            # A single profile is for any number of rows, except where `rows` gives each token the index of its profile.
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
        soft_tokens: Sequence[Tensor | None] | None = None,
        log_prob_weights: Sequence[float] | None = None,
        **options: Any,
    ) -> Any:
        """Answer each prompt with its own profile, `batch_size` prompts at a time.

        Args:
            prompts: a text, or a list of texts and chats (lists of messages). Leave it out with `input_ids`.
            profiles: one profile for each prompt, or a single profile for all prompts, as for `mixture`. If left out,
                the answers use the mixture that is set, or else the served profile.
            max_new_tokens: the maximum number of tokens of an answer. The default is 256, or with `input_ids` the
                default of transformers.
            temperature: at 0, the most likely token is taken. Above 0, tokens are sampled; without `options`, they
                depend on the seed and the prompt's place, but not on the other prompts of the batch. With `input_ids`,
                0 means that the model's generation config decides.
            seed: the seed of the sampling.
            batch_size: the number of prompts that are answered at once.
            places: the place of each prompt in a longer list of which `prompts` is a part. Prompts with equal places
                get the same random numbers.
            soft_tokens: for each prompt, its soft tokens, a tensor [N, H], or None. They take the place of embeddings
                of tokens before the prompt. H is the width of the base's embeddings.
            log_prob_weights: a weight for each prompt. Consecutive prompts with equal `places` then form a group, whose
                tokens are drawn from the weighted sum of the log-probabilities of its rows, so that all its answers are
                equal (multi-objective decoding). Give each row of a group the same prompt and its own profile.
            options: arguments of transformers' generate: num_beams, do_sample, top_p, streamer, ... If there are any,
                transformers' generate also samples the tokens.

        Returns:
            One text for each prompt, or n consecutive texts for each prompt with `num_return_sequences=n`. With
            `input_ids`, the result of transformers' generate.

        Raises:
            DeclarationError: in the same cases as `mixture`.
            UsageError: in the same cases as `mixture`, and if the numbers of prompts and profiles differ.
            RunError: if a batch does not fit on the GPU. The message gives the batch size that fits.
        """
        return self._generation.generate(
            prompts,
            profiles,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            places=places,
            soft_tokens=soft_tokens,
            log_prob_weights=log_prob_weights,
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
        """Yield one answer piece by piece, while a second thread generates it within its own mixture.

        Args:
            prompt: a text, or a chat as a list of messages.
            profile: as for `mixture`. If left out, the answer uses the mixture that is set, or else the served profile.
            max_new_tokens: the maximum number of tokens of the answer.
            temperature, seed: as for `generate`.
            prefixes: a cache of keys and values. If an earlier prompt with the same soup began with the same tokens,
                the keys and values of these tokens are taken from the cache. This saves time in chats, because each
                prompt of a chat begins with the previous prompt.

        Raises:
            UsageError: if a profile is given, but this thread has set a mixture. The errors of `generate` are raised
                when the first piece is read.
        """
        return self._generation.stream(
            prompt, profile, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, prefixes=prefixes
        )

    def resolve(self, profile: ProfileLike) -> ExpertWeights:
        """Return the checked weights of a profile, which `mixture` accepts as a profile and does not check again.

        This call does not wait for other threads' mixtures, so a server can resolve requests while a batch is running.

        Raises:
            DeclarationError, UsageError: in the same cases as `mixture` with this profile.
        """
        weights = self._registry.resolve(profile)
        self._active.check(self._registry.scaled(weights))
        return weights

    def cache_key(self, profile: ProfileLike) -> str:
        """Return the key under which the keys and values of a prompt with this profile may be cached.

        The key changes with the weights, the experts, the dtype and the model. For a schedule, the weight of step 0
        counts, because the prompt is computed with it.
        """
        with self._active.lock:
            return self.layers.cache_key(self._registry.resolve_scaled(profile))

    def unload(self) -> Any:
        """Remove all experts, put the base's own layers back, and return the transformers model."""
        self.experts.change([], list(self.experts))
        return self.model
