"""The tokenizer of a GGUF file as transformers' tokenizer, with a padding token.

It is built from the file's vocabulary by the library tokenizers, because versions of transformers differ in what they
make of a GGUF file: some name no special tokens, and some add tokens for which the model has no embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from personalized_soups.bases.gguf_header import GgufHeader
from personalized_soups.bases.split_rules import SPLIT_RULES, SplitRule
from personalized_soups.errors import FileFormatError, InputError

# Tokens that the vocabularies of published models reserve for padding, in order of preference.
_PADDING = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>")

# ggml's numbers for special tokens that texts contain only on purpose, and for other tokens that are never split
_CONTROL, _USER_DEFINED = 3, 4

# Sentencepiece writes a space as this character.
_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary of a GGUF file.

    Attributes:
        header: the file's header.
        tokens: the tokens by id.
        ids: the ids by token.
    """

    header: GgufHeader
    tokens: Sequence[str]
    ids: dict[str, int]

    @classmethod
    def of(cls, header: GgufHeader) -> Vocabulary:
        """Read the vocabulary.

        Raises:
            InputError: if the file has no tokenizer.
            FileFormatError: if a token is repeated, or is not UTF-8.
        """
        tokens = header.texts("tokenizer.ggml.tokens")
        if not tokens:
            raise _unusable(header, "the GGUF file has no tokenizer")
        ids = {token: number for number, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            raise FileFormatError(
                f"the vocabulary of the GGUF file repeats {len(tokens) - len(ids)} tokens",
                where=str(header.path),
                mend="convert the model again with llama.cpp's convert_hf_to_gguf.py",
            )
        return cls(header, tokens, ids)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the tokenizer, such as `model`."""
        return self.header.metadata.get(f"tokenizer.ggml.{key}", default)

    def special(self, name: str) -> str | None:
        """Return a special token by its name, such as `eos`, or None if the file does not name it."""
        number = self.value(f"{name}_token_id")
        return self.tokens[number] if isinstance(number, int) and number < len(self.tokens) else None

    def of_type(self, kind: int) -> list[str]:
        """Return all tokens of a type."""
        types = self.value("token_type", ())
        return [token for token, each in zip(self.tokens, types, strict=False) if each == kind]


def open_tokenizer(header: GgufHeader) -> Any:
    """Return the tokenizer of a GGUF file.

    A padding token that the file does not name is chosen: a token that the vocabulary has for padding, or else the end
    token. Training and generation mask padding by its place, so an end token that is also the padding token counts.

    Raises:
        InputError: if the file has no tokenizer or no end token, or if its kind of tokenizer is not supported.
        FileFormatError: if the vocabulary is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary.of(header)
    end = vocabulary.special("eos")
    if end is None:
        raise _unusable(header, "the tokenizer of the GGUF file has no end token, so answers would never end")
    template = header.metadata.get("tokenizer.chat_template")
    length = header.of_architecture("context_length")
    special = {f"{name}_token": vocabulary.special(key) for name, key in (("bos", "bos"), ("unk", "unknown"))}
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=_backend(vocabulary),
        eos_token=end,
        pad_token=vocabulary.special("padding") or next((each for each in _PADDING if each in vocabulary.ids), end),
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def end_ids(header: GgufHeader, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the end token, and the end of a turn if the file names another token."""
    of_turn = header.metadata.get("tokenizer.ggml.eot_token_id")
    turn = [of_turn] if isinstance(of_turn, int) and of_turn < len(tokenizer) else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *turn]))


def _backend(vocabulary: Vocabulary) -> Any:
    from tokenizers import AddedToken

    kind = vocabulary.value("model")
    if kind == "gpt2":
        backend, adds_start = _byte_level(vocabulary)
    elif kind == "llama":
        backend, adds_start = _sentencepiece(vocabulary)
    else:
        raise _unusable(vocabulary.header, f"the tokenizer {kind!r} of the GGUF file is not supported (gpt2, llama)")
    named = [vocabulary.special(name) for name in ("bos", "eos", "unknown", "padding")]
    control = dict.fromkeys([*vocabulary.of_type(_CONTROL), *(token for token in named if token is not None)])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.of_type(_USER_DEFINED)])
    _add_ends(backend, vocabulary, adds_start=adds_start)
    return backend


def _byte_level(vocabulary: Vocabulary) -> tuple[Any, bool]:
    """Return a tokenizer that merges bytes, and whether it adds the start token by default."""
    from tokenizers import Tokenizer, decoders, models

    name = vocabulary.value("pre", "default")
    rule: SplitRule | None = SPLIT_RULES.get(name)
    if rule is None:
        known = ", ".join(SPLIT_RULES)
        raise _unusable(vocabulary.header, f"the tokenizer splits texts by the rule {name!r}; known are {known}")
    merges = vocabulary.header.texts("tokenizer.ggml.merges")
    if merges is None:
        raise _unusable(vocabulary.header, "the tokenizer of the GGUF file has no merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        model = models.BPE(vocab=vocabulary.ids, merges=pairs, ignore_merges=rule.takes_whole)
    except Exception as fault:  # tokenizers raises no narrower one for a token that the vocabulary lacks
        raise _unusable(vocabulary.header, f"the merges do not fit the vocabulary: {str(fault)[:200]}") from fault
    backend: Any = Tokenizer(model)
    backend.pre_tokenizer = rule.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend, rule.adds_start


def _sentencepiece(vocabulary: Vocabulary) -> tuple[Any, bool]:
    """Return a tokenizer that merges characters as sentencepiece does; it adds the start token by default.

    Sentencepiece's score of a token is the place of its merge, negated. Any two tokens whose text together is a token
    may merge to it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = vocabulary.value("scores")
    if not isinstance(scores, tuple) or len(scores) != len(vocabulary.tokens):
        raise _unusable(vocabulary.header, "the tokenizer of the GGUF file has no score for each token")
    found = []
    for token, number in vocabulary.ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary.ids and right in vocabulary.ids:
                found.append((-scores[number], vocabulary.ids[left], vocabulary.ids[right]))
    merges = [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in sorted(found)]
    unknown = vocabulary.special("unknown")
    backend: Any = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    has_prefix = bool(vocabulary.value("add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return backend, True


def _add_ends(backend: Any, vocabulary: Vocabulary, *, adds_start: bool) -> None:
    """Add the start and the end token around each text where the file, or the kind of tokenizer, says so."""
    from tokenizers import processors

    start, end = vocabulary.special("bos"), vocabulary.special("eos")
    before = [start] if start is not None and vocabulary.value("add_bos_token", adds_start) else []
    after = [end] if end is not None and vocabulary.value("add_eos_token", False) else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(token, vocabulary.ids[token]) for token in dict.fromkeys([*before, *after])],
        )


def _unusable(header: GgufHeader, what: str) -> InputError:
    return InputError(
        what,
        where=str(header.path),
        mend="convert the model again with llama.cpp's convert_hf_to_gguf.py; or give the model's folder or hub id",
    )
