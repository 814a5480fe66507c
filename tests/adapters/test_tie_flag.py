from __future__ import annotations

from typing import Any

import pytest

from personalized_soups.adapters.tie_flag import says_tied

Config = dict[str, Any]

FALSE = {"tie_word_embeddings": False}
TRUE = {"tie_word_embeddings": True}

SAID: dict[str, tuple[Config, bool | None]] = {
    "the model's": ({"model_type": "unknown", **FALSE, "text_config": TRUE}, False),
    "the text model's": ({"model_type": "unknown", "text_config": TRUE}, True),
    "the language model's": ({"model_type": "unknown", "llm_config": FALSE, "vision_config": TRUE}, False),
    "the thinker's": ({"model_type": "unknown", "thinker_config": {"text_config": TRUE}}, True),
    "null": ({"model_type": "unknown", "tie_word_embeddings": None, "language_config": TRUE}, True),
    "nothing": ({"model_type": "unknown", "vision_config": TRUE, "audio_config": TRUE}, None),
    "no type": ({"text_config": FALSE}, False),
    # the defaults and rules of classes in transformers
    "GPT-2": ({"model_type": "gpt2"}, True),
    "Gemma": ({"model_type": "gemma"}, True),
    "Llama": ({"model_type": "llama", "text_config": TRUE}, False),
    "LFM2": ({"model_type": "lfm2", "tie_embedding": False}, False),
    "Qwen2-VL, as written before transformers 5": ({"model_type": "qwen2_vl", **FALSE, "text_config": TRUE}, True),
    "a class that refuses the rest": ({"model_type": "llama", "hidden_size": "wide", "text_config": TRUE}, True),
}


@pytest.mark.parametrize("kind", SAID)
def test_the_flag_of_the_whole_model_counts_then_that_of_its_text_model(kind: str) -> None:
    config, want = SAID[kind]
    assert says_tied(config) is want
