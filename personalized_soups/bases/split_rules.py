"""How vocabularies of byte-level tokens split a text before they merge bytes: the values of `tokenizer.ggml.pre`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How a text is split before its bytes are merged.

    Attributes:
        pattern: the regular expression of the pieces, or None for GPT-2's.
        splits_digits: split numbers into digits first.
        takes_whole: use a piece that is a token as it is, even if no merges lead to it.
        adds_start: add the start token where the file does not say whether to.
    """

    pattern: str | None = None
    splits_digits: bool = False
    takes_whole: bool = False
    adds_start: bool = False

    def pre_tokenizer(self) -> Any:
        """Return the pre-tokenizer of the library tokenizers."""
        from tokenizers import Regex, pre_tokenizers

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        first: list[Any] = []
        if self.splits_digits:
            first = [pre_tokenizers.Digits(individual_digits=True)]
        elif self.pattern is not None:
            first = [pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")]
        return pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level


# The patterns of the models' published tokenizer.json
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2_RULE = SplitRule()
_DIGITS_RULE = SplitRule(splits_digits=True)
_LLAMA3_RULE = SplitRule(_LLAMA3, takes_whole=True, adds_start=True)
_QWEN2_RULE = SplitRule(_QWEN2)

SPLIT_RULES: Mapping[str, SplitRule] = {
    "default": _GPT2_RULE,
    "gpt-2": _GPT2_RULE,
    "smollm": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "tekken": SplitRule(_TEKKEN, takes_whole=True),
}
