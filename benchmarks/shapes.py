"""Shapes of the models that are measured, and how many bytes their files hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

BYTES_OF = MappingProxyType({"F32": 4, "BF16": 2})

# The experts' rank, and their number: PEFT and mergekit merge the first three of six.
RANK = 16
NUM_EXPERTS = 6


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's shape. Its experts adapt all seven linear layers."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Every adapted linear layer: its name and (out, in) features."""
        kv = self.hidden // self.heads * self.kv_heads
        one = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{layer}.{name}": pair for layer in range(self.layers) for name, pair in one.items()}

    def base_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of every tensor of the base; its embeddings are tied, so there is no lm_head."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for name, pair in self.modules.items():
            yield f"{name}.weight", pair
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's tensors."""
        return sum(math.prod(shape) for _, shape in self.base_tensors()) * BYTES_OF["BF16"]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's tensors."""
        return sum((out + into) for out, into in self.modules.values()) * RANK * BYTES_OF["F32"]

    @property
    def b_bytes(self) -> int:
        """Bytes of one expert's B's alone."""
        return sum(out for out, _ in self.modules.values()) * RANK * BYTES_OF["F32"]


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("tiny", 64, 256, 2, 4, 2, 512),
            Shape("embedded", 128, 384, 4, 2, 2, 1024),
            Shape("tiny-deep", 64, 256, 8, 4, 2, 512),
            Shape("1b", 2048, 8192, 16, 32, 8, 32000),
            Shape("1b-deep", 2048, 8192, 64, 32, 8, 32000),
            Shape("8b", 4096, 14336, 32, 32, 8, 128256),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Scale:
    """The three shapes of one run (most rows, the base four times as deep, and the largest experts), and users kept."""

    main: Shape
    deep: Shape
    large: Shape
    profiles: int


SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "tiny": Scale(SHAPES["tiny"], SHAPES["tiny-deep"], SHAPES["tiny"], 2_000),
        "1b": Scale(SHAPES["1b"], SHAPES["1b-deep"], SHAPES["8b"], 1_000_000),
    }
)
