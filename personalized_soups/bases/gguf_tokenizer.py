"""The tokenizer of a GGUF file as transformers' tokenizer, with a padding token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from personalized_soups.bases.gguf_header import GgufHeader
from personalized_soups.errors import InputError

# transformers checks few values before it uses them, so a damaged vocabulary may raise any of these errors.
_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError)

# Tokens that the vocabularies of published models reserve for padding, in order of preference.
_PADDING = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>")


def open_tokenizer(header: GgufHeader) -> Any:
    """Return the tokenizer of a GGUF file.

    A padding token that the file does not name is chosen: a token that the vocabulary has for padding, or else the end
    token. Training and generation mask padding by its place, so an end token that is also the padding token counts.

    Raises:
        InputError: if the file has no tokenizer, no end token, or a tokenizer that transformers cannot read.
    """
    from transformers import PreTrainedTokenizerFast

    metadata, path = header.metadata, header.path
    if "tokenizer.ggml.tokens" not in metadata:
        raise _unusable(path, "the GGUF file has no tokenizer")
    try:
        # Not AutoTokenizer, which first reads the model's configuration with gguf's reader: that takes seconds.
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    except _FAULTS as fault:
        raise _unusable(path, f"the tokenizer of the GGUF file cannot be read: {str(fault)[:200]}") from fault
    tokenizer = _only_listed(tokenizer, metadata["tokenizer.ggml.tokens"])
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer.backend_tokenizer)
    if tokenizer.eos_token is None:
        raise _unusable(path, "the tokenizer of the GGUF file has no end token, so answers would never end")
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((each for each in _PADDING if each in vocabulary), tokenizer.eos_token)
    length = header.of_architecture("context_length")
    if isinstance(length, int):
        tokenizer.model_max_length = length
    return tokenizer


def end_ids(header: GgufHeader, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the end token, and the end of a turn if the file names another token."""
    of_turn = header.metadata.get("tokenizer.ggml.eot_token_id")
    turn = [of_turn] if isinstance(of_turn, int) and of_turn < len(tokenizer) else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *turn]))


def _only_listed(tokenizer: Any, num_tokens: int) -> Any:
    """Return the tokenizer without tokens that the file does not list.

    transformers adds the special tokens of GPT-2, <|endoftext|>, to every vocabulary of this kind. Without such a
    token in the file, its id is behind the last one, and the model has no embedding for it.
    """
    if len(tokenizer) <= num_tokens:
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    table = json.loads(tokenizer.backend_tokenizer.to_str())
    table["added_tokens"] = [token for token in table["added_tokens"] if token["id"] < num_tokens]
    listed = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    known = {name: text for name, text in listed.items() if tokenizer.convert_tokens_to_ids(text) < num_tokens}
    adds = {name: True for name in ("add_bos_token", "add_eos_token") if getattr(tokenizer, name, False)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(table)),
        chat_template=tokenizer.chat_template,
        **known,
        **adds,
    )


def _split_digits(backend: Any) -> None:
    """Split numbers into digits before words are split, as SmolLM's tokenizer does. transformers does not know it."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _unusable(path: Path, what: str) -> InputError:
    return InputError(
        what,
        where=str(path),
        mend="convert the model again with llama.cpp's convert_hf_to_gguf.py; or give the model's folder or hub id",
    )
