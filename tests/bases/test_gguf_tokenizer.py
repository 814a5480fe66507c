"""The tokenizers of GGUF files against the tokenizers that the files were written from."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from personalized_soups.bases.gguf_header import GgufHeader, TextArray
from personalized_soups.bases.gguf_model import write_model
from personalized_soups.bases.gguf_tokenizer import open_tokenizer
from personalized_soups.bases.split_rules import SPLIT_RULES
from personalized_soups.errors import FileFormatError, InputError

CORPUS = [
    "wash the old kettle with warm water and soap",
    "it's 12 o'clock, and 2023 was wet",
    "we'll rub  it dry\n\n ok",
]
TEXTS = [*CORPUS, "  two spaces ", "", "kettle 1234567!", "naïve 漢字 \U0001f600", "IT'S", "tab\tand\r\nline"]


class Written(GgufHeader):
    """A header whose arrays of strings are in memory."""

    def texts(self, key: str) -> list[str] | None:
        found: list[str] | None = self.metadata.get(key)
        return found


def header_of(**fields: Any) -> GgufHeader:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return Written(Path("m.gguf"), 0, MappingProxyType({"general.architecture": "llama", **metadata}), {})


def listed(tokenizer: Tokenizer) -> list[str]:
    return [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def merges_of(tokenizer: Tokenizer) -> list[str]:
    return [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def byte_level(rule: str) -> Tokenizer:
    """Train a byte-level tokenizer that splits as the model's published tokenizer.json does."""
    tokenizer = Tokenizer(models.BPE())
    pattern = SPLIT_RULES[rule].pattern
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if rule in {"smollm", "starcoder"}:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


@pytest.mark.parametrize("rule", SPLIT_RULES)
def test_byte_level_vocabularies_give_the_ids_they_were_trained_with(rule: str) -> None:
    original = byte_level(rule)
    types = [3] + [1] * (original.get_vocab_size() - 1)
    header = header_of(
        model="gpt2", pre=rule, tokens=listed(original), merges=merges_of(original), token_type=types, eos_token_id=0
    )
    ours = open_tokenizer(header)
    for text in [*TEXTS, "a<|end|>b"]:
        ids = ours(text)["input_ids"]
        assert ids == original.encode(text).ids
        assert ours.decode(ids) == text


def sentencepiece() -> tuple[Tokenizer, list[str], list[float], list[int]]:
    """Train a tokenizer as Llama 2's tokenizer.json has it, with a token for each byte."""
    special, in_bytes = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(prefix)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=[*special, *in_bytes], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokens = listed(tokenizer)
    # sentencepiece scores merged tokens in their order, and characters after them
    scores = [0.0] * 259 + [-float(number) for number in range(len(tokens) - 259)]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    return tokenizer, tokens, scores, types


def test_a_sentencepiece_vocabulary_gives_the_ids_of_llama_2() -> None:
    original, tokens, scores, types = sentencepiece()
    fields = {"model": "llama", "tokens": tokens, "scores": tuple(scores), "token_type": tuple(types)}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    ours = open_tokenizer(header_of(**fields, **ends))
    for text in [*TEXTS, "a</s>b"]:
        if text:
            ids = ours(text)["input_ids"]
            assert ids[0] == 1  # llama.cpp adds the start token where the file does not say whether to
            assert ids[1:] == original.encode(text).ids
            assert ours.decode(ids, skip_special_tokens=True) == text.replace("</s>", " ")  # each part has a prefix
    others = {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    without = open_tokenizer(header_of(**fields, **ends, **others))
    assert without("wash")["input_ids"][-1] == 2
    assert without.decode(without("wash")["input_ids"], skip_special_tokens=True) == "wash"
    assert original.token_to_id("▁") not in without("wash")["input_ids"]


def test_a_tokenizer_of_llama_3_adds_the_start_token_and_takes_whole_pieces() -> None:
    tokens = [*listed(byte_level("llama-bpe")), "<|begin|>", "kettle"]
    fields = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "merges": [],
        "token_type": [3] + [1] * (len(tokens) - 3) + [3, 1],
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": 0,
    }
    ours = open_tokenizer(header_of(**fields))
    # no merge leads to kettle, but it is a piece and a token
    assert ours("kettle")["input_ids"] == [len(tokens) - 2, len(tokens) - 1]


def test_tokens_of_the_user_are_never_split() -> None:
    original = byte_level("default")
    tokens = [*listed(original), "<think>"]
    types = [3] + [1] * (len(tokens) - 2) + [4]
    ours = open_tokenizer(
        header_of(model="gpt2", tokens=tokens, merges=merges_of(original), token_type=types, eos_token_id=0)
    )
    ids = ours("a<think>b")["input_ids"]
    assert ids.count(len(tokens) - 1) == 1
    assert ours.decode(ids, skip_special_tokens=True) == "a<think>b"  # not a special token


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        ({"pre": "poro-chat"}, InputError, "splits texts by the rule 'poro-chat'; known are default, gpt-2, smollm"),
        ({"model": "t5"}, InputError, r"tokenizer 't5' .* not supported \(gpt2, llama\)"),
        ({"merges": ["a q9"]}, InputError, "merges do not fit the vocabulary"),
        ({"merges": None}, InputError, "has no merges"),
        ({"tokens": ["a", "b", "a"]}, FileFormatError, "repeats 1 tokens"),
        ({"tokens": None}, InputError, "has no tokenizer"),
        ({"eos_token_id": 10_000}, InputError, "has no end token"),
        ({"model": "llama"}, InputError, "has no score for each token"),
    ],
)
def test_an_unusable_tokenizer_is_rejected(change: dict[str, Any], kind: type[InputError], what: str) -> None:
    original = byte_level("default")
    fields = {"model": "gpt2", "tokens": listed(original), "merges": merges_of(original), "eos_token_id": 0}
    with pytest.raises(kind, match=what) as caught:
        open_tokenizer(header_of(**fields | change))
    assert caught.value.where == "m.gguf"


def test_the_written_tokenizer_is_the_opened_one(small_gguf: Path, tmp_path: Path) -> None:
    """transformers builds a tokenizer anew when it loads a folder: nothing may be lost on the way."""
    write_model(small_gguf, tmp_path)
    header = GgufHeader.read(small_gguf)
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], TextArray)
    opened, loaded = open_tokenizer(header), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(opened, PreTrainedTokenizerFast)
    assert opened.get_vocab() == loaded.get_vocab()
    assert opened.special_tokens_map == loaded.special_tokens_map
    assert opened.chat_template == loaded.chat_template
    for text in TEXTS:
        assert opened(text)["input_ids"] == loaded(text)["input_ids"]
