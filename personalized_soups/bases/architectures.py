"""What GGUF files of each architecture mean: the model's configuration, and the names and row order of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from personalized_soups.bases.gguf_header import GgufHeader
from personalized_soups.errors import FileFormatError, InputError

# llama.cpp writes Llama 3's long-context frequencies as this tensor.
ROPE_FACTORS = "rope_freqs.weight"

# The settings of "llama3" in every published Llama 3.1, 3.2 and 3.3; the factor is read from the file.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Factors are stored as float32, and llama.cpp computes them from float32 frequencies.
_FACTOR_TOLERANCE = 1e-4

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Architecture:
    """How GGUF files of one architecture are read.

    Attributes:
        model_type: transformers' name of the architecture.
        is_permuted: whether llama.cpp reorders the rows of q and k, because its rotary embedding turns neighbouring
            pairs of values, and transformers' turns the two halves of a head.
        more: returns the keys of the configuration that only this architecture has.
    """

    model_type: str
    is_permuted: bool
    more: Callable[[GgufHeader], Mapping[str, Any]]


def _of_llama(header: GgufHeader) -> Mapping[str, Any]:
    tensors = header.tensors
    biases = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    return {"head_dim": _head_dim(header), **biases}


def _of_mistral(header: GgufHeader) -> Mapping[str, Any]:
    return {"head_dim": _head_dim(header), "sliding_window": header.of_architecture("attention.sliding_window")}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", True, _of_llama),
    "qwen2": Architecture("qwen2", False, lambda header: {}),
    "qwen3": Architecture("qwen3", False, lambda header: {"head_dim": _head_dim(header)}),
}
# llama.cpp writes Mistral as Llama, and the window of its attention as a key.
_MISTRAL = Architecture("mistral", True, _of_mistral)


def architecture_of(header: GgufHeader) -> Architecture:
    """Return how a file is read.

    Raises:
        InputError: if this package cannot read the file's architecture, or a variant of it that the header states.
    """
    name = header.architecture
    if name not in ARCHITECTURES:
        raise _unsupported(header, f"the architecture {name!r}")
    if header.of_architecture("expert_count", 0):
        raise _unsupported(header, f"the architecture {name!r} with a mixture of experts")
    window = header.of_architecture("attention.sliding_window")
    if window is None:
        return ARCHITECTURES[name]
    if name != "llama":
        raise _unsupported(header, f"the architecture {name!r} with an attention window")
    return _MISTRAL


def model_config(header: GgufHeader) -> Any:
    """Return the configuration of the model in a GGUF file, as transformers' class for the architecture.

    Numbers that the file holds as float32 become the shortest decimal number with that float32 value: 1e-05, and not
    9.999999747378752e-06.

    Raises:
        InputError: if the architecture, or how it encodes positions, is not supported.
        FileFormatError: if a key is missing.
    """
    from transformers import AutoConfig

    architecture = architecture_of(header)
    num_heads = _needed(header, "attention.head_count")
    return AutoConfig.for_model(
        architecture.model_type,
        vocab_size=_vocab_size(header),
        hidden_size=_needed(header, "embedding_length"),
        intermediate_size=_needed(header, "feed_forward_length"),
        num_hidden_layers=_needed(header, "block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=_number(header, "attention.head_count_kv", num_heads),
        max_position_embeddings=_needed(header, "context_length"),
        rms_norm_eps=_decimal(_needed(header, "attention.layer_norm_rms_epsilon", float)),
        rope_parameters=_rope(header),
        tie_word_embeddings="output.weight" not in header.tensors,
        **architecture.more(header),
    )


def name_in_model(tensor: str) -> str | None:
    """Return the name that transformers gives a tensor of a GGUF file, or None if the tensor is unknown."""
    if tensor in _TOP:
        return _TOP[tensor]
    match = _BLOCK.fullmatch(tensor)
    if match is None or match[2] not in _PARTS:
        return None
    return f"model.layers.{match[1]}.{_PARTS[match[2]]}.{match[3]}"


def row_order(header: GgufHeader, tensor: str, num_rows: int) -> np.ndarray | None:
    """Return the rows of the file's tensor in the order of transformers, as int64, or None for the same order.

    In each head, llama.cpp has rotary pairs next to each other: rows 0, D/2, 1, D/2 + 1, ... of transformers' tensor.
    """
    match = _BLOCK.fullmatch(tensor)
    if match is None or match[2] not in {"attn_q", "attn_k"} or not architecture_of(header).is_permuted:
        return None
    num_heads = _needed(header, "attention.head_count")
    if match[2] == "attn_k":
        num_heads = _number(header, "attention.head_count_kv", num_heads)
    if num_heads <= 0 or num_rows % (2 * num_heads):
        raise FileFormatError(
            f"the tensor {tensor} has {num_rows} rows, which are not {num_heads} heads of an even size",
            where=str(header.path),
            mend="download or convert the file again",
        )
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """Return by what Llama 3 divides each rotary frequency, a float64 array of `head_dim / 2` values.

    Source: apply_scaling in https://github.com/meta-llama/llama-models (models/llama3/model.py).
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = (_LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    share = np.clip(smooth, 0.0, 1.0)
    return np.asarray(1 / ((1 - share) / factor + share))


def _rope(header: GgufHeader) -> dict[str, Any]:
    theta = _decimal(_number(header, "rope.freq_base", 10000.0))
    head_dim, rotated = _head_dim(header), header.of_architecture("rope.dimension_count")
    if rotated is not None and rotated != head_dim:
        raise _unsupported(header, f"a rotary embedding of {rotated} of {head_dim} values")
    kind = header.of_architecture("rope.scaling.type", "none")
    if ROPE_FACTORS in header.tensors:
        return {"rope_type": "llama3", "rope_theta": theta, "factor": _llama3_factor(header, theta), **_LLAMA3}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in {"linear", "yarn"}:
        raise _unsupported(header, f"the scaling {kind!r} of rotary embeddings")
    scaling = {"rope_type": kind, "rope_theta": theta, "factor": _needed(header, "rope.scaling.factor", float)}
    if kind == "yarn":
        original = _needed(header, "rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_factor(header: GgufHeader, theta: float) -> float:
    tensor = header.tensors[ROPE_FACTORS]
    stored = np.fromfile(header.path, "<f4", count=math.prod(tensor.shape), offset=tensor.start).astype(np.float64)
    head_dim = _head_dim(header)
    if tensor.type_id == 0 and stored.shape == (head_dim // 2,):
        factor = float(stored.max())
        if np.allclose(stored, llama3_factors(factor, theta, head_dim), rtol=_FACTOR_TOLERANCE, atol=0):
            return _decimal(factor)
    raise _unsupported(header, f"the values of {ROPE_FACTORS}, which are not Llama 3's,")


def _head_dim(header: GgufHeader) -> int:
    num_heads = _needed(header, "attention.head_count")
    return int(_number(header, "attention.key_length", _needed(header, "embedding_length") // max(num_heads, 1)))


def _vocab_size(header: GgufHeader) -> int:
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise FileFormatError(
            "the GGUF file has no token embeddings (token_embd.weight)",
            where=str(header.path),
            mend="give the GGUF file of a language model; a file of a split model needs its other parts",
        )
    return embeddings.shape[0]


def _needed(header: GgufHeader, key: str, kind: type = int) -> Any:
    value = _number(header, key, None)
    if value is None:
        raise FileFormatError(
            f"the header lacks the key {header.architecture}.{key}",
            where=str(header.path),
            mend="write the file again with llama.cpp's convert_hf_to_gguf.py",
        )
    return kind(value)


def _number(header: GgufHeader, key: str, default: Any) -> Any:
    value = header.of_architecture(key, default)
    if value is not default and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise _unsupported(header, f"{key} = {str(value)[:40]}, which is not one number for all layers,")
    return value


def _decimal(value: float) -> float:
    return float(str(np.float32(value)))


def _unsupported(header: GgufHeader, what: str) -> InputError:
    known = ", ".join(sorted(ARCHITECTURES))
    return InputError(
        f"a GGUF file with {what} cannot be a base: the supported architectures are {known} (with Mistral and SmolLM, "
        "which are written as llama)",
        where=str(header.path),
        mend="give the model's folder or hub id; or, if transformers reads the file, save it as a folder: "
        "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(NEW), and the tokenizer likewise",
    )
