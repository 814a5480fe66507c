"""Answer prompts with a base model, alone or with an adapter. Many prompts run in batches; one prompt can stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from personalized_soups.adapters.base_adapter import open_on
from personalized_soups.devices import resolve_device
from personalized_soups.errors import InputError
from personalized_soups.generation.loading import (
    Dtype,
    check_adapter_folder,
    check_same_adapter,
    check_same_base,
    load_adapter,
    load_base,
    load_tokenizer,
)
from personalized_soups.generation.own_config import OwnGenerationConfig
from personalized_soups.generation.prompts import Prompt, PromptRequest, check_tokens, encode_prompt, prompt_place
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.generation.sampling import DrawnTokens, Sampling, pad_left, uniforms
from personalized_soups.generation.soft_tokens import with_soft_tokens
from personalized_soups.generation.special_tokens import num_embeddings, pad_id, stop_ids
from personalized_soups.generation.streaming import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Within(NamedTuple):
    """What a batch is generated with, in addition to the model.

    Attributes:
        processors: further logits processors.
        past: a cache of transformers with the keys and values of the prompts' beginnings. Generation extends it.
        soft_tokens: for each row, the soft tokens [N, H] before its prompt, or None. Without any, it may be empty.
    """

    processors: Sequence[Any] = ()
    past: Any = None
    soft_tokens: Sequence[Tensor | None] = ()


# Makes the context that the generating thread enters around each batch. The argument is the prompt index of each row
# of the batch.
Around: TypeAlias = Callable[[Sequence[int]], AbstractContextManager[Within]]


class Generator:
    """Answers prompts with one model.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. It is put into evaluation mode. Of
            its own generation config only the end tokens apply. The caller decides sampling and lengths.
        tokenizer: the base's tokenizer. If it has a chat template, the template renders the prompts.

    Attributes:
        model: the model.
        tokenizer: the tokenizer.
        stop_ids: the ids that end an answer.
        num_embeddings: the number of tokens for which the model has an embedding, or None if unknown.
        pad_id: the id that pads shorter rows.
        own_config: the model's own generation config.

    Example:
        >>> generator = Generator.open(TINY_BASE, device="cpu")
        >>> answers = generator.answers(["How do I clean a lamp?"], greedy=True, max_new_tokens=4)
        >>> len(answers[0])
        1
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids(model, tokenizer)
        self.num_embeddings = num_embeddings(model)
        self.pad_id = pad_id(tokenizer, self.num_embeddings)
        self.own_config = OwnGenerationConfig(model)

    @classmethod
    def open(
        cls,
        base: str | Path,
        adapter: str | Path | None = None,
        *,
        on: str | Path | None = None,
        device: str = "auto",
        dtype: Dtype = "float32",
        fold: bool = True,
        same_base: bool = False,
    ) -> Self:
        """Load a base and, if given, an adapter, and return a generator with them.

        Args:
            base: the name of a named base (`tiny`, `smollm2`), a folder, a GGUF file or a hub id.
            adapter: a PEFT adapter folder, or None for the base alone.
            on: the folder of the LoRA adapter, such as an SFT adapter, on top of which `adapter` was trained. Its delta
                is added to the base's weights, also if `adapter` is None.
            device: `auto` (CUDA if there is a CUDA device), `cpu`, `cuda`, ...
            dtype: the dtype of the model; `auto` takes the dtype of its files.
            fold: add the adapter to the base's weights once, which answers faster than computing both at every token.
            same_base: do not compare the base with the base's fingerprint that the adapter records.

        Raises:
            SoupError: if the base, an adapter or the device is missing or not usable, or if the adapter was trained on
                another base or on top of another adapter than `on`.
        """
        if adapter is not None:
            check_adapter_folder(Path(adapter))
        chosen = resolve_device(device)
        base_adapter = open_on(on, same_base=same_base)
        if adapter is not None:
            check_same_adapter(Path(adapter), None if base_adapter is None else base_adapter.record)
        tokenizer = load_tokenizer(base)
        model: Any = load_base(base, device=chosen, dtype=dtype, on=base_adapter)
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
        """Answer prompts. The same seed gives the same answers on one machine.

        The random numbers of answer s to prompt p depend only on the seed, p and s. So two models that get the same
        prompts and seed sample with the same random numbers.

        Args:
            prompts: texts and chats.
            num_samples: the number of answers to each prompt.
            temperature: divides the logits. At 0 the most likely token is taken.
            max_new_tokens: the maximum number of tokens in an answer.
            batch_size: the number of answers to generate at a time.
            seed: the seed of the random numbers.
            greedy: take the most likely token at any temperature.
            places: the index of each answer in a longer list of which the prompts are a part. It replaces the answer's
                index in this call where random numbers are chosen.
            on_done: called after each batch with the number of finished answers.
            around: makes a context to enter around each batch.
            in_order: batch the prompts in their order. By default, prompts of similar length share a batch.

        Returns:
            The answers to each prompt, without the end token and without white space around the text.

        Raises:
            InputError: if a prompt cannot be encoded; see `encoded`.
            ValueError: if max_new_tokens or temperature is out of range.
        """
        sampling = Sampling(max_new_tokens, 0.0 if greedy else temperature)
        encoded = [self.encoded(prompt) for prompt in prompts]
        rows = [index for index in range(len(prompts)) for _ in range(num_samples)]
        # Prompts of similar length share a batch, so that a batch has little padding.
        order = sorted(range(len(rows)), key=lambda row: 0 if in_order else len(encoded[rows[row]]))
        texts = [""] * len(rows)
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            own_places = group if places is None else [places[row] for row in group]
            indices = [rows[row] for row in group]
            with nullcontext(Within()) if around is None else around(indices) as within:
                batch = [encoded[index] for index in indices]
                answers = self._generate(batch, own_places, sampling, seed, within=within)
            for row, tokens in zip(group, answers, strict=True):
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
        """Yield one answer piece by piece. The concatenated pieces are the answer that `answers` returns.

        Another thread generates the answer and enters the context of `around`. Arguments and errors are those of
        `answers`.
        """
        sampling = Sampling(max_new_tokens, 0.0 if greedy else temperature)
        encoded = self.encoded(prompt)
        tokens: list[int] = []
        yielded = ""

        def generate(stream: TokenStream) -> None:
            with nullcontext(Within()) if around is None else around([0]) as within:
                self._generate([encoded], [0], sampling, seed, within=within, stream=stream)

        for token in TokenStream(generate):
            tokens.append(token)
            # `text` strips white space at the end, so the space is yielded with the next word. A token may end within a
            # character. Such a character decodes as U+FFFD until the next token completes it.
            text = self.text(tokens)
            if text.startswith(yielded) and not text.endswith("\ufffd") and len(text) > len(yielded):
                yield text[len(yielded) :]
                yielded = text
        yield self.text(tokens)[len(yielded) :]

    def _generate(
        self,
        prompts: list[list[int]],
        places: list[int],
        sampling: Sampling,
        seed: int,
        *,
        within: Within,
        stream: TokenStream | None = None,
    ) -> list[list[int]]:
        """Return the new tokens of each prompt. The random numbers depend on the seed and `places`."""
        from transformers import GenerationConfig

        device = self.model.device
        prompts, inputs = with_soft_tokens(
            self.model, prompts, within.soft_tokens, bos_id=self.tokenizer.bos_token_id, filler=self.pad_id
        )
        ids_BT, mask_BT = pad_left(prompts, self.pad_id, device)
        draws = np.stack([uniforms(seed, place, sampling.max_new_tokens) for place in places])
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
        with quiet_transformers(), torch.no_grad(), self.own_config.set_aside():
            out_BT = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                logits_processor=[*within.processors, drawn],
                past_key_values=within.past,
                streamer=stream,
                stopping_criteria=[stream] if stream is not None else None,
                **inputs,
            )
        new_BN: Tensor = out_BT[:, ids_BT.shape[1] :]
        return [list(map(int, row)) for row in new_BN.tolist()]

    def encoded(self, prompt: Prompt, *, where: str | None = None, num_soft: int = 0) -> list[int]:
        """Return the token ids of a prompt. The answer begins after them.

        Args:
            prompt: a text or a chat.
            where: the prompt's place, for errors. By default, errors quote the prompt's first words.
            num_soft: the number of soft tokens before the prompt, which take up positions of the model.

        Raises:
            InputError: if the chat template rejects the prompt; if the prompt has no tokens, leaves no position for an
                answer, or has a token without an embedding; or if it is a chat and there is no chat template.
        """
        place = where or prompt_place(prompt)
        tokens = encode_prompt(self.tokenizer, prompt, where=where)
        if not tokens:
            raise InputError("the prompt has no tokens", where=place, mend="write a prompt with text")
        check_tokens(tokens, self.tokenizer, self.num_embeddings, where=place)
        most = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(most, int) and len(tokens) + num_soft >= most:
            soft = f" and {num_soft} soft tokens before them" if num_soft else ""
            raise InputError(
                f"the prompt has {len(tokens)} tokens{soft}, but the model takes at most {most - 1}",
                where=place,
                mend="shorten the prompt, or use a base model with a longer context",
            )
        return tokens

    def check(self, prompts: Iterable[PromptRequest]) -> None:
        """Raise InputError, with file and line, for the first prompt that `encoded` rejects."""
        for request in prompts:
            self.encoded(request.prompt, where=request.where)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens before the first stop token, without white space around it."""
        end = next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        text = self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()
