"""The flag in a model's configuration that ties the embeddings.

Tied embeddings are one tensor: transformers uses the input embedding also as the output embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_FLAG = "tie_word_embeddings"

# The keys under which the configuration of a multimodal model contains that of its language model. First come the keys
# of PreTrainedConfig.get_text_config, then the keys of single models.
_TEXT_CONFIGS = (
    "text_config", "decoder", "generator", "text_encoder", "language_config", "llm_config", "thinker_config",
    "vlm_config",
)  # fmt: skip

# LFM2's own name for the flag. If it is present, it overrides tie_word_embeddings.
_OTHER_FLAG = "tie_embedding"


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether a configuration ties the embeddings, or None if the configuration does not say.

    The flag of the whole model counts. If the whole model has no flag, the flag of its text model counts. Flags of
    other parts (vision, audio) never count.

    Unless the whole model's flag is true, the configuration's class in transformers decides if that flag is missing or
    is not the only one: some classes tie the embeddings by default, and some classes prefer the text model's flag.
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
    """Return the flag after transformers has parsed the configuration, or None if transformers cannot parse it."""
    from transformers import CONFIG_MAPPING

    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception:  # classes validate their input in various ways and raise various errors
        return None
    flag = getattr(read, _FLAG, None)
    return flag if isinstance(flag, bool) else None
