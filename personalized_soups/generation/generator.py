"""A base model, alone or with an adapter, that answers prompts: many at once, or one streamed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from personalized_soups.errors import InputError
from personalized_soups.generation.loading import (
    Dtype,
    check_adapter_folder,
    check_same_base,
    choose_device,
    load_adapter,
    load_base,
    load_tokenizer,
)
from personalized_soups.generation.prompts import Prompt, PromptRequest, check_tokens, encode_prompt, prompt_place
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.generation.sampling import DrawnTokens, Sampling, pad_left, uniforms
from personalized_soups.generation.streaming import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Within(NamedTuple):
    """What a batch is answered with, beside the model.

    Args:
        processors: further logits processors.
        past: a cache of transformers' that holds the keys and values of the prompts' beginnings; it grows.
    """

    processors: Sequence[Any] = ()
    past: Any = None


# Entered around each batch, by the thread that generates it, with the numbers of its rows' prompts.
Around: TypeAlias = Callable[[Sequence[int]], AbstractContextManager[Within]]


class Generator:
    """Answers prompts with one model.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. It is put into evaluation mode. Of
            its own generation config only the end tokens are heeded: it may sample, penalise or cut, and here only what
            the caller asks for counts.
        tokenizer: the base's tokenizer; its chat template is used where it has one.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids(model, tokenizer)
        self.num_embeddings = num_embeddings(model)
        self.pad_id = pad_id(tokenizer, self.num_embeddings)
        self._forgetting_lock = threading.Lock()
        self._num_forgetting = 0
        self._own_configs: list[tuple[Any, Any]] = []

    @classmethod
    def open(
        cls,
        base: str | Path,
        adapter: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: Dtype = "float32",
        fold: bool = True,
        same_base: bool = False,
    ) -> Self:
        """Load a base (folder or hub id) and an adapter folder.

        Args:
            base: a folder or a hub id.
            adapter: a PEFT adapter folder, or None for the base alone.
            device: `auto`, `cpu`, `cuda`, ...
            dtype: in which the model is held and computes.
            fold: fold the adapter into the weights (faster) instead of computing it beside them.
            same_base: take it that this is the adapter's base, whatever the fingerprints say.

        Raises:
            SoupError: if base, adapter or device are not there or not usable, or the adapter is another base's.
        """
        if adapter is not None:
            check_adapter_folder(Path(adapter))
        chosen = choose_device(device)
        tokenizer = load_tokenizer(base)
        model: Any = load_base(base, device=chosen, dtype=dtype)
        if adapter is not None:
            if not same_base:
                check_same_base(base, Path(adapter))
            model = load_adapter(model, adapter, fold=fold)
        return cls(model, tokenizer)

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        batch_size: int = 64,
        seed: int = 0,
        greedy: bool = False,
        places: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
        around: Around | None = None,
        in_order: bool = False,
    ) -> list[list[str]]:
        """Return `num_samples` answers for each prompt, without end token and outer white space.

        The same seed gives the same answers on one machine. Answer s of prompt p has its own random numbers, which
        depend on seed, p and s alone: two models that are asked with one seed answer from common random numbers.
        Where these prompts are a part of more, `places` are their answers' places in the whole, one for each answer.
        `on_done` hears after each batch how many answers there are so far. `around` is entered around each batch, with
        the numbers of its rows' prompts. Batches are made of prompts of like length, unless `in_order`.
        """
        sampling = Sampling(max_new_tokens, 0.0 if greedy else temperature)
        encoded = [self.encoded(prompt) for prompt in prompts]
        rows = [index for index in range(len(prompts)) for _ in range(num_samples)]
        # Prompts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(rows)), key=lambda row: 0 if in_order else len(encoded[rows[row]]))
        texts = [""] * len(rows)
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            drawn_by = group if places is None else [places[row] for row in group]
            asked = [rows[row] for row in group]
            with nullcontext(Within()) if around is None else around(asked) as within:
                said = self._generate([encoded[index] for index in asked], drawn_by, sampling, seed, within=within)
            for row, tokens in zip(group, said, strict=True):
                texts[row] = self.text(tokens)
            if on_done is not None:
                on_done(start + len(group))
        return [texts[first : first + num_samples] for first in range(0, len(texts), num_samples)]

    def stream(
        self,
        prompt: Prompt,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        greedy: bool = False,
        around: Around | None = None,
    ) -> Iterator[str]:
        """Yield the answer piece by piece; the pieces together are what `answers` gives for this prompt and seed.

        `around` is entered while it is generated, on a thread of its own.
        """
        sampling = Sampling(max_new_tokens, 0.0 if greedy else temperature)
        encoded = self.encoded(prompt)
        tokens: list[int] = []
        said = ""

        def generate(stream: TokenStream) -> None:
            with nullcontext(Within()) if around is None else around([0]) as within:
                self._generate([encoded], [0], sampling, seed, within=within, stream=stream)

        for token in TokenStream(generate):
            tokens.append(token)
            # White space at the end waits for what follows (the answer is stripped), and so does half a character.
            text = self.text(tokens)
            if text.startswith(said) and not text.endswith("\ufffd") and len(text) > len(said):
                yield text[len(said) :]
                said = text
        yield self.text(tokens)[len(said) :]

    def _generate(
        self,
        prompts: list[list[int]],
        rows: list[int],
        sampling: Sampling,
        seed: int,
        *,
        within: Within,
        stream: TokenStream | None = None,
    ) -> list[list[int]]:
        """Return the new tokens of each prompt; `rows` are the places that their random numbers depend on."""
        from transformers import GenerationConfig

        device = self.model.device
        ids_BT, mask_BT = pad_left(prompts, self.pad_id, device)
        draws = np.stack([uniforms(seed, row, sampling.max_new_tokens) for row in rows])
        drawn = DrawnTokens(
            torch.from_numpy(draws).to(device), temperature=sampling.temperature, prompt_width=ids_BT.shape[1]
        )
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=self.pad_id,
        )
        with quiet_transformers(), torch.no_grad(), self.forgetting_own_generation():
            out_BT = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                logits_processor=[*within.processors, drawn],
                past_key_values=within.past,
                streamer=stream,
                stopping_criteria=[stream] if stream is not None else None,
            )
        new_BN: Tensor = out_BT[:, ids_BT.shape[1] :]
        return [list(map(int, row)) for row in new_BN.tolist()]

    @contextmanager
    def forgetting_own_generation(self) -> Iterator[None]:
        """Let the model, and what PEFT wraps in it, have a generation config that changes nothing within the block.

        Several threads may be within at once: the last one out puts the model's own back.
        """
        with self._forgetting_lock:
            if self._num_forgetting == 0:
                self._own_configs = _forget_own_generation(self.model)
            self._num_forgetting += 1
        try:
            yield
        finally:
            with self._forgetting_lock:
                self._num_forgetting -= 1
                if self._num_forgetting == 0:
                    for part, config in self._own_configs:
                        part.generation_config = config

    def encoded(self, prompt: Prompt, *, where: str | None = None) -> list[int]:
        """Return the token ids after which the answer begins.

        Args:
            prompt: a text or a chat.
            where: its place, for errors; its first words if left out.

        Raises:
            InputError: if there are none or more than the model has positions, if the model has no embedding for one
                of them, or as encode_prompt.
        """
        place = where or prompt_place(prompt)
        tokens = encode_prompt(self.tokenizer, prompt, where=where)
        if not tokens:
            raise InputError("the prompt has no tokens", where=place, mend="write what is to be answered")
        check_tokens(tokens, self.tokenizer, self.num_embeddings, where=place)
        most = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(most, int) and len(tokens) >= most:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, the model reads fewer than {most}",
                where=place,
                mend="shorten it, or take a base model with a longer context",
            )
        return tokens

    def check(self, prompts: Iterable[PromptRequest]) -> None:
        """Raise InputError, naming file and line, for the first prompt that can't be answered."""
        for asked in prompts:
            self.encoded(asked.prompt, where=asked.where)

    def text(self, tokens: Sequence[int]) -> str:
        """Return what the tokens before the first stop token say."""
        end = next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        text = self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's end token and those of the model's generation config."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    listed = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return frozenset({int(tokenizer.eos_token_id), *map(int, listed)})


def num_embeddings(model: Any) -> int | None:
    """Return how many tokens the model has an embedding for, None where it does not say."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None or weight.ndim != 2 else int(weight.shape[0])


def pad_id(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> int:
    """Return the id that fills shorter rows: the tokenizer's, or 0 where the base has no embedding for that one.

    A padding token is often added to a tokenizer alone. Filled places are masked, so any token will do.
    """
    own = int(tokenizer.pad_token_id)
    return own if num_embeddings is None or own < num_embeddings else 0


def _forget_own_generation(model: Any) -> list[tuple[Any, Any]]:
    """Give the model, and what PEFT wraps in it, an empty generation config, and return what each of them had."""
    from transformers import GenerationConfig

    parts = {id(part): part for part in (model, getattr(model, "base_model", model), _wrapped(model))}.values()
    own = [(part, part.generation_config) for part in parts if getattr(part, "generation_config", None) is not None]
    for part, _ in own:
        part.generation_config = GenerationConfig()
    return own


def _wrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
