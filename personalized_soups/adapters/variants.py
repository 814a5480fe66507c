"""Every key of PEFT's LoraConfig, sorted consciously: understood, without a bearing on the saved factors, or refused.

Tests compare these tables with docs/reference/adapters.md, and with the LoraConfig of the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

# Keys that give the tensors their meaning; AdapterConfig reads them.
READ = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type",
    "peft_version", "r", "rank_pattern", "revision", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip

# Keys that do not change what the saved tensors mean: settings of the training, and those of variants that are off.
# An initialisation's settings count only where init_lora_weights names it: they stay behind after a conversion.
HARMLESS = frozenset({
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "layers_pattern", "lora_dropout", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """A variant of LoRA that is not merged: its name, why, what to do, and what the key says where it is off.

    An empty table is the variant with its defaults (peft.tuners.lora.config._get_lora_subconfig), but for a few keys.
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
        "layer replication", "its base has other layers than the checkpoint",
        "write the base with its layers repeated, and train on that", (None, []),
    ),
    "alora_invocation_tokens": Refusal(
        "aLoRA", "it acts only after certain tokens, so no sum of weights is equal to it",
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
        "LoftQ", "its factors hold what the quantised base lost, so they fit that base alone",
        "train the expert with init_lora_weights=True (QLoRA) on the base itself", (None, {}),
    ),
    "kasa_config": Refusal(
        "KaSA", "it cuts the base's smallest singular values off and scales each rank by a trained number",
        _RETRAIN.format("kasa_config"),
    ),
    "arrow_config": Refusal(
        "Arrow", "it chooses among adapters token by token", "give the adapters that it routes between instead",
    ),
    "monteclora_config": Refusal(
        "MonteCLoRA", "it draws its factors at random around the saved ones", _RETRAIN.format("monteclora_config"),
    ),
    "velora_config": Refusal(
        "VeLoRA", "it saves states of its training among the factors", _RETRAIN.format("velora_config"),
    ),
    "use_bdlora": Refusal(
        "BD-LoRA", "its factors are saved as the blocks of a block-diagonal matrix", _RETRAIN.format("use_bdlora"),
        (None, False),
    ),
})  # fmt: skip

# Initialisations that leave the base as it is, so that what an expert adds to it is s B A. MiCA's B is taken from the
# base, but its A begins at zero (peft.tuners.lora.layer.LoraLayer.mica_init).
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Those that move the base (W - s B0 A0 stays), by the beginning of their names, with the mend.
MOVING_INITS: Mapping[str, str] = MappingProxyType({
    "pissa": _CONVERT,
    "olora": _CONVERT,
    "corda": _CONVERT,
    "lora_ga": _CONVERT,
    "loftq": REFUSED["loftq_config"].mend,
})  # fmt: skip

OTHER_INIT = "train the expert with init_lora_weights true, gaussian, eva, orthogonal or mica"
