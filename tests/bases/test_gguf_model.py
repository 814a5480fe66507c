"""The model of a GGUF file against the model that the file was written from, and against gguf's own dequantization."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from personalized_soups.bases.gguf_model import write_model
from personalized_soups.errors import FileFormatError, InputError
from tests.gguf_files import Fields, dequantized, gguf_name, permuted, write_gguf

TEXTS = ["wash the old kettle", " 12 and 2023!", "<|user|>so that\n it looks nice<|eos|>", ""]


def made(path: Path, folder: Path) -> Path:
    folder.mkdir()
    write_model(path, folder)
    return folder


def random_model(folder: Path, small_base: Path, model_type: str, **options: Any) -> Path:
    """Write a random model of an architecture, with several heads for each of k and v, and random biases and norms."""
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        for tensor in model.parameters():
            torch.nn.init.normal_(tensor, mean=0.1 if tensor.ndim == 1 else 0.0, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        values: torch.Tensor = model(torch.arange(5, 45).reshape(2, 20)).logits
    return values


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_the_model_of_a_float32_file_computes_the_same_logits(
    tmp_path: Path, small_base: Path, model_type: str, options: dict[str, Any]
) -> None:
    """The tensors and the configuration are the same, so the arithmetic is: the logits agree in every bit."""
    original = random_model(tmp_path / "original", small_base, model_type, **options)

    def scale(fields: Fields, _: Any) -> None:
        if "rope_parameters" in options:
            fields |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}

    written_as = "llama" if model_type == "mistral" else model_type
    file = write_gguf(tmp_path / "m.gguf", original, architecture=written_as, change=scale)
    folder = made(file, tmp_path / "made")
    assert AutoConfig.from_pretrained(folder).model_type == model_type
    assert torch.equal(logits(folder), logits(original))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, ties to even, by integer arithmetic; the result is float32."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"])
def test_every_tensor_is_ggufs_own_dequantization_rounded_once(
    tmp_path: Path, small_base: Path, quantization: str
) -> None:
    original = random_model(tmp_path / "original", small_base, "llama", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "m.gguf", original, quantization=quantization)
    tensors = load_file(made(path, tmp_path / "made") / "model.safetensors")
    expected = dequantized(path)
    assert {gguf_name(name) for name in tensors} == expected.keys()
    kept = {"F32": torch.float32, "F16": torch.float16}.get(quantization, torch.bfloat16)
    for name, tensor in tensors.items():
        assert tensor.dtype == kept
        found = tensor.float().numpy()
        # the rows of q and k are compared in llama.cpp's order
        if ".q_proj." in name or ".k_proj." in name:
            found = permuted(found, 4 if ".q_proj." in name else 2)
        values = expected[gguf_name(name)].reshape(found.shape)
        if kept == torch.float16:
            values = values.astype(np.float16).astype(np.float32)
        elif kept == torch.bfloat16:
            values = to_bfloat16(values)
        np.testing.assert_array_equal(found, values, err_msg=name)


def test_a_block_of_q4_1_is_scale_times_number_plus_minimum(tmp_path: Path, small_base: Path) -> None:
    """The definition in ggml-common.h, block_q4_1, in float64: independent of gguf."""
    original = random_model(tmp_path / "original", small_base, "qwen2", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "m.gguf", original, quantization="Q4_1", architecture="qwen2")
    import gguf

    stored = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.1.ffn_down.weight")
    blocks = np.asarray(stored.data, np.uint8).reshape(-1, 20)
    scales, minima = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float64) for at in (0, 2))
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = (scales * numbers + minima).reshape(64, 96)
    found = load_file(made(path, tmp_path / "made") / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    # bfloat16 has 8 significant bits: half a unit in the last place is 2**-8 of the value, or less. The sum in float32
    # adds at most 2**-24 of the larger term, and the terms are below 4.
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2**-8, atol=4 * 2**-23)


def test_large_tensors_are_written_in_pieces(
    tmp_path: Path, small_base: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(made(small_gguf, tmp_path / "whole") / "model.safetensors")
    monkeypatch.setattr("personalized_soups.bases.gguf_tensors._PIECE_VALUES", 200)  # three rows of 64 values
    calls: list[tuple[int, int]] = []
    (tmp_path / "pieces").mkdir()
    write_model(small_gguf, tmp_path / "pieces", lambda done, total: calls.append((done, total)))
    pieces = load_file(tmp_path / "pieces" / "model.safetensors")
    assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.items())
    assert len(calls) > len(whole) * 10
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    assert calls == sorted(calls)
    assert calls[-1] == (num_bytes, num_bytes)


def test_numbers_are_the_decimal_ones_of_the_published_configuration(tmp_path: Path, small_base: Path) -> None:
    original = random_model(tmp_path / "original", small_base, "llama", tie_word_embeddings=False)
    config = AutoConfig.from_pretrained(made(write_gguf(tmp_path / "m.gguf", original), tmp_path / "made"))
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 10000.0)
    assert config.architectures == ["LlamaForCausalLM"]


def test_the_frequencies_of_llama_3_are_found_in_its_tensor(tmp_path: Path, small_base: Path) -> None:
    """llama.cpp writes the factors as a tensor. transformers computes them from the configuration, as an oracle."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # a head of 64 values has frequencies in all three ranges of Llama 3's rule
    original = random_model(tmp_path / "original", small_base, "llama", head_dim=64, rope_parameters=rope)
    scaled = AutoModelForCausalLM.from_pretrained(original).model.rotary_emb.inv_freq.double().numpy()
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (plain / scaled).astype(np.float32)
    assert len(np.unique(factors.round(3))) > 3

    def with_factors(_: Fields, tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = factors

    folder = made(write_gguf(tmp_path / "m.gguf", original, change=with_factors), tmp_path / "made")
    assert AutoConfig.from_pretrained(folder).rope_parameters == rope
    assert torch.equal(logits(folder), logits(original))

    def with_others(_: Fields, tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = np.linspace(1, 32, 32, dtype=np.float32)

    other = write_gguf(tmp_path / "other.gguf", original, change=with_others)
    with pytest.raises(InputError, match=r"rope_freqs\.weight, which are not Llama 3's"):
        made(other, tmp_path / "never")


def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, small_base: Path, small_gguf: Path) -> None:
    ours = AutoTokenizer.from_pretrained(made(small_gguf, tmp_path / "made"))
    original = AutoTokenizer.from_pretrained(small_base)
    for text in TEXTS:
        assert ours(text)["input_ids"] == original(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "wash it"}]
    texts = [each.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for each in (ours, original)]
    assert texts[0] == texts[1] == "<|user|>wash it<|assistant|>"
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert ours.model_max_length == 256


@pytest.mark.parametrize(("has_own", "expected"), [(True, "<|pad|>"), (False, "<|eos|>")])
def test_a_tokenizer_without_a_padding_token_gets_one(
    tmp_path: Path, small_base: Path, has_own: bool, expected: str
) -> None:
    def without(fields: Fields, _: Any) -> None:
        del fields["tokenizer.ggml.padding_token_id"]
        if not has_own:
            tokens = fields["tokenizer.ggml.tokens"]
            fields["tokenizer.ggml.tokens"] = ["<|other|>" if token == "<|pad|>" else token for token in tokens]

    folder = made(write_gguf(tmp_path / "m.gguf", small_base, change=without), tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token == expected
    padded = tokenizer(["wash", "wash the old kettle"], padding=True)["input_ids"]
    assert len(padded[0]) == len(padded[1])
    assert AutoConfig.from_pretrained(folder).pad_token_id == tokenizer.pad_token_id


def test_no_token_is_added_that_the_model_has_no_embedding_for(tmp_path: Path, small_gguf: Path) -> None:
    """transformers adds <|endoftext|> to byte-level vocabularies; the small one does not have it."""
    folder = made(small_gguf, tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == AutoConfig.from_pretrained(folder).vocab_size
    assert max(tokenizer("a<|endoftext|>b")["input_ids"]) < len(tokenizer)


def test_the_start_token_is_added_where_the_file_says_so(tmp_path: Path, small_base: Path) -> None:
    def adds_bos(fields: Fields, _: Any) -> None:
        fields["tokenizer.ggml.add_bos_token"] = True

    folder = made(write_gguf(tmp_path / "m.gguf", small_base, change=adds_bos), tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("wash")["input_ids"][0] == tokenizer.bos_token_id


def test_a_token_that_ends_a_turn_ends_answers_too(tmp_path: Path, small_base: Path) -> None:
    from transformers import GenerationConfig

    def with_turn(fields: Fields, _: Any) -> None:
        fields["tokenizer.ggml.eot_token_id"] = fields["tokenizer.ggml.tokens"].index("<|user|>")

    folder = made(write_gguf(tmp_path / "m.gguf", small_base, change=with_turn), tmp_path / "made")
    tokens = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(
        GenerationConfig.from_pretrained(folder).eos_token_id
    )
    assert tokens == ["<|eos|>", "<|user|>"]


def test_the_numbers_of_smollm_are_split_into_digits(tmp_path: Path, small_base: Path) -> None:
    def smollm(fields: Fields, _: Any) -> None:
        # the small vocabulary gets a token that only a tokenizer without this rule can use
        fields["tokenizer.ggml.pre"] = "smollm"
        tokens = fields["tokenizer.ggml.tokens"]
        fields["tokenizer.ggml.merges"] = ["1 2", *fields["tokenizer.ggml.merges"]]
        tokens[tokens.index("<|system|>")] = "12"
        fields["tokenizer.ggml.token_type"][tokens.index("12")] = 1

    folder = made(write_gguf(tmp_path / "m.gguf", small_base, change=smollm), tmp_path / "made")
    assert AutoTokenizer.from_pretrained(folder).tokenize("12") == ["1", "2"]


def _drop_tensor(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    del tensors["blk.1.ffn_up.weight"]


def _add_tensor(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.attn_sinks.weight"] = np.zeros(4, np.float32)


def _widen(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    fields["llama.feed_forward_length"] = 128


def _no_tokens(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    for key in [key for key in fields if key.startswith("tokenizer.")]:
        del fields[key]


def _no_end(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    del fields["tokenizer.ggml.eos_token_id"]


def _unknown_tokenizer(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    fields["tokenizer.ggml.model"] = "rwkv"


def _experts(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    fields["llama.expert_count"] = 8


def _no_layers(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    del fields["llama.block_count"]


def _list_of_heads(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    fields["llama.attention.head_count"] = [2, 2]


def _other_scaling(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    fields["llama.rope.scaling.type"] = "longrope"


def _no_embeddings(fields: Fields, tensors: dict[str, np.ndarray]) -> None:
    del tensors["token_embd.weight"]


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        (_drop_tensor, FileFormatError, r"lacks 1 tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"),
        (_add_tensor, FileFormatError, r"no place for blk\.1\.attn_sinks\.weight"),
        (_widen, FileFormatError, r"ffn_gate\.weight has the shape \(96, 64\), but the model needs \(128, 64\)"),
        (_no_tokens, InputError, "has no tokenizer"),
        (_no_end, InputError, "has no end token"),
        (_unknown_tokenizer, InputError, "tokenizer 'rwkv' of the GGUF file is not supported"),
        (_experts, InputError, "mixture of experts.*supported architectures are llama, qwen2, qwen3"),
        (_no_layers, FileFormatError, r"lacks the key llama\.block_count"),
        (_list_of_heads, InputError, "not one number for all layers"),
        (_other_scaling, InputError, "'longrope'"),
        (_no_embeddings, FileFormatError, "no token embeddings"),
    ],
)
def test_a_file_that_is_not_one_whole_supported_model_is_rejected(
    tmp_path: Path, small_base: Path, change: Any, kind: type[InputError], what: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", small_base, change=change)
    with pytest.raises(kind, match=what) as caught:
        made(path, tmp_path / "made")
    assert caught.value.where == str(path)
    assert caught.value.mend


def test_another_architecture_is_named_with_the_supported_ones(tmp_path: Path, small_base: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", small_base, architecture="mamba")
    with pytest.raises(InputError, match=r"architecture 'mamba'.*llama, qwen2, qwen3") as caught:
        made(path, tmp_path / "made")
    assert "gguf_file=" in caught.value.mend


def test_a_file_without_a_chat_template_has_none(tmp_path: Path, small_base: Path) -> None:
    def without(fields: Fields, _: Any) -> None:
        del fields["tokenizer.chat_template"]

    folder = made(write_gguf(tmp_path / "m.gguf", small_base, change=without), tmp_path / "made")
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    assert not (folder / "chat_template.jinja").exists()


def test_truncation_at_any_place_is_reported_with_the_size(tmp_path: Path, small_gguf: Path) -> None:
    size = small_gguf.stat().st_size
    data = small_gguf.read_bytes()
    for length in (5, 20, 100, 3000, size // 2, size - 1000):
        short = tmp_path / f"{length}.gguf"
        short.write_bytes(data[:length])
        folder = tmp_path / f"made-{length}"
        with pytest.raises(FileFormatError, match=f"truncated: it has {length} bytes") as caught:
            made(short, folder)
        assert caught.value.where == str(short)
        shutil.rmtree(folder)
