"""Write a model folder as a GGUF file, by the rules of llama.cpp's convert_hf_to_gguf.py and not with our code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Fields = dict[str, Any]

# llama.cpp's names, spelled out
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, *rest = stem.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(rest)]}.{kind}"


def permuted(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py: the halves of each head become neighbouring pairs of rows."""
    halves = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    folder: Path,
    *,
    quantization: str = "F32",
    architecture: str = "llama",
    change: Callable[[Fields, dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """Write the model and the tokenizer of a folder to a GGUF file.

    Args:
        path: the file to write.
        folder: the model folder.
        quantization: the type of all matrices; vectors are float32.
        architecture: the file's `general.architecture`.
        change: changes the metadata and the tensors, by llama.cpp's names, before they are written.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if architecture == "llama" and ".q_proj" in name:
            values = permuted(values, config.num_attention_heads)
        elif architecture == "llama" and ".k_proj" in name:
            values = permuted(values, config.num_key_value_heads)
        tensors[gguf_name(name)] = values
    if config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    fields = {**_model_fields(config, architecture), **_tokenizer_fields(folder)}
    if change is not None:
        change(fields, tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        _add(writer, key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, values in tensors.items():
        if values.ndim == 1 or quantization == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Return the float32 values of a GGUF file by llama.cpp's names, read by gguf alone."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def _model_fields(config: Any, architecture: str) -> Fields:
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if getattr(config, "head_dim", None):
        fields |= {"attention.key_length": config.head_dim, "rope.dimension_count": config.head_dim}
    if config.model_type == "mistral":
        fields["attention.sliding_window"] = config.sliding_window
    return {f"{architecture}.{key}": value for key, value in fields.items()}


def _tokenizer_fields(folder: Path) -> Fields:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        # 3 is CONTROL and 1 is NORMAL
        "tokenizer.ggml.token_type": [3 if number in tokenizer.all_special_ids else 1 for _, number in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in table["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
