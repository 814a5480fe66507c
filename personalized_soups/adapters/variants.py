"""All keys of PEFT's LoraConfig: keys that are read, keys that do not matter, and keys that are rejected.

Tests compare these tables with docs/reference/adapters.md, and with the LoraConfig of the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

# Keys that decide what the saved tensors mean. AdapterConfig reads these keys.
READ = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type",
    "peft_version", "r", "rank_pattern", "revision", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip

# Keys that do not affect what the saved tensors mean: settings of the training, and settings of an initialisation. The
# latter matter only if init_lora_weights names that initialisation. A conversion to plain LoRA leaves them in the file.
HARMLESS = frozenset({
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "layers_pattern", "lora_dropout", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """A variant of LoRA that is rejected.

    Attributes:
        name: the variant's name.
        why: why its adapters cannot be merged.
        mend: the fix.
        off: the values of the key that switch the variant off. For most keys, an empty object switches the variant on
            with its defaults (peft.tuners.lora.config._get_lora_subconfig).
    """

    name: str
    why: str
    mend: str
    off: tuple[Any, ...] = (None,)


_CONVERT = (
    "convert it to plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
)
_RETRAIN = "train the expert without {}"

REFUSED: Mapping[str, Refusal] = MappingProxyType({
    "layer_replication": Refusal(
        "layer replication", "the model has more layers than the base's checkpoint",
        "save the base with its layers repeated, and train the expert on that copy", (None, []),
    ),
    "alora_invocation_tokens": Refusal(
        "aLoRA", "it is active only after certain tokens, so no merged weights have the same effect",
        _RETRAIN.format("alora_invocation_tokens"), (None, []),
    ),
    "megatron_config": Refusal(
        "Megatron's parallel layers", "each process saves its own slice of the factors",
        _RETRAIN.format("megatron_config"), (None, {}),
    ),
    "use_qalora": Refusal(
        "QALoRA", "A acts on sums over groups of a quantised layer's inputs",
        _RETRAIN.format("use_qalora"), (None, False),
    ),
    "loftq_config": Refusal(
        "LoftQ", "its factors correct errors of a quantised base, so they fit only that base",
        "train the expert with init_lora_weights=True (QLoRA) on the base itself", (None, {}),
    ),
    "kasa_config": Refusal(
        "KaSA", "it removes the base's smallest singular values and scales each rank by a trained number",
        _RETRAIN.format("kasa_config"),
    ),
    "arrow_config": Refusal(
        "Arrow", "it chooses an adapter for each token", "merge the adapters that Arrow chooses from",
    ),
    "monteclora_config": Refusal(
        "MonteCLoRA", "it draws its factors at random around the saved ones", _RETRAIN.format("monteclora_config"),
    ),
    "velora_config": Refusal(
        "VeLoRA", "it saves training state together with the factors", _RETRAIN.format("velora_config"),
    ),
    "use_bdlora": Refusal(
        "BD-LoRA", "its factors are saved as the blocks of a block-diagonal matrix", _RETRAIN.format("use_bdlora"),
        (None, False),
    ),
})  # fmt: skip

# Initialisations that do not change the base, so that an expert's delta is scaling * B @ A. MiCA initialises B from the
# base, but A with zeros (peft.tuners.lora.layer.LoraLayer.mica_init).
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Initialisations that change the base's weight to W - scaling * B0 @ A0, where B0 and A0 are the initial factors. The
# keys are the starts of their names, and the values say what the user can do.
MOVING_INITS: Mapping[str, str] = MappingProxyType({
    "pissa": _CONVERT,
    "olora": _CONVERT,
    "corda": _CONVERT,
    "lora_ga": _CONVERT,
    "loftq": REFUSED["loftq_config"].mend,
})  # fmt: skip

OTHER_INIT = "train the expert with init_lora_weights true, gaussian, eva, orthogonal or mica"
