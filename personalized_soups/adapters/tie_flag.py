"""Whether a model's configuration ties its input and output embeddings, so that transformers makes them one tensor."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_FLAG = "tie_word_embeddings"

# The keys of the language model's configuration in a multimodal one: first those of PreTrainedConfig.get_text_config,
# then those of single models.
_TEXT_CONFIGS = (
    "text_config", "decoder", "generator", "text_encoder", "language_config", "llm_config", "thinker_config",
    "vlm_config",
)  # fmt: skip

# LFM2's own name for the flag, which overrides it.
_OTHER_FLAG = "tie_embedding"


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether a configuration ties the embeddings, or None if it does not decide that.

    The flag of the whole model counts, or else that of the text model; flags of other parts (vision, audio) never do.
    In doubt, the configuration's class in transformers decides: some classes tie embeddings by default, and some read
    the text model's flag although the whole model has one.
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
    """Return the flag as transformers' class reads it, or None if there is no such class or it raises."""
    from transformers import CONFIG_MAPPING

    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception:  # classes validate their input in various ways and raise various errors
        return None
    flag = getattr(read, _FLAG, None)
    return flag if isinstance(flag, bool) else None
