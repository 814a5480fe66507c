"""What a model's configuration says of its input and output embeddings: whether transformers makes them one tensor."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_FLAG = "tie_word_embeddings"

# The configuration of the language model inside of a multimodal one: those of PreTrainedConfig.get_text_config, then
# those that models name otherwise.
_TEXT_CONFIGS = (
    "text_config", "decoder", "generator", "text_encoder", "language_config", "llm_config", "thinker_config",
    "vlm_config",
)  # fmt: skip

# LFM2's own name for the flag, which overrides it.
_OTHER_FLAG = "tie_embedding"


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether a configuration ties the embeddings, or None where it does not say so.

    The flag of the whole model counts, and the text model's where there is none; those of other parts (vision, audio)
    never do. Where that leaves room, the configuration's class in transformers decides: some have tied embeddings by
    default, and some read the text model's flag although the whole model has one.
    """
    flag = config.get(_FLAG)
    if flag is True:
        return True
    stated = _stated(config)
    has_doubt = flag is None or _OTHER_FLAG in config or any(map(_stated, _text_configs(config)))
    by_class = _by_class(config) if has_doubt else None
    return stated if by_class is None else by_class


def _stated(config: Mapping[str, Any]) -> bool | None:
    flag = config.get(_FLAG)
    if isinstance(flag, bool):
        return flag
    return next((flag for flag in map(_stated, _text_configs(config)) if flag is not None), None)


def _text_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)]


def _by_class(config: Mapping[str, Any]) -> bool | None:
    """Return what the class in transformers reads, or None where it has none for this model, or refuses it."""
    from transformers import CONFIG_MAPPING

    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception:  # anything: classes check what they are given in ways of their own
        return None
    flag = getattr(read, _FLAG, None)
    return flag if isinstance(flag, bool) else None
