"""adapter_config.json: what kind of LoRA it is.

An allow-list stands behind it: what is not known to be plain LoRA is refused by name.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from personalized_soups.errors import FileFormatError, InputError, UnsupportedAdapterError
from personalized_soups.files.reader import parse_json

CONFIG_FILE = "adapter_config.json"

_MAX_CONFIG_BYTES = 16 << 20

# Initialisations that leave the base weights as they are, so that the delta is s B A.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

_CONVERSION = (
    "convert it to plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
)
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")

# Keys that do not change what the saved factors mean: names, training-time settings, and which modules were chosen
# (the tensors themselves say which modules there are).
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "target_modules", "task_type", "eva_config", "runtime_config",
})  # fmt: skip

# Keys that this file understands.
_READ = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"})

# Keys of known variants that change the forward pass or the base; each is plain when it says this.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
    "use_qalora": (False, None),
    "loftq_config": (None, {}),
    "corda_config": (None, {}),
    "lora_ga_config": (None, {}),
    "kasa_config": (None, {}),
    "arrow_config": (None, {}),
    "monteclora_config": (None, {}),
    "velora_config": (None, {}),
    "use_bdlora": (None, False, {}),
    "ensure_weight_tying": (False, None),
}

# A pattern is a regular expression to PEFT. Only module names are taken: a stranger's expression could run for years.
_PATTERN = re.compile(r"\^?[\w.\-]+\$?")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The parts of a LoRA configuration that give the saved factors their meaning."""

    path: Path
    rank: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str | None
    revision: str | None
    task_type: str | None
    target_modules: tuple[str, ...] | None
    peft_version: str | None

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read and check `adapter_config.json` in `folder`.

        Raises:
            FileFormatError: if it is missing, not JSON, or a value is out of place.
            UnsupportedAdapterError: naming the first variant of LoRA that this version does not merge.
        """
        path = Path(folder) / CONFIG_FILE
        table = _read(path)
        kind = table.get("peft_type")
        if kind != "LORA":
            raise _refused(path, f"peft_type is {kind!r}", "give an adapter of type LORA")
        _check_init(path, table.get("init_lora_weights", True))
        _check_variants(path, table)
        targets = table.get("target_modules")
        # With these keys a list of targets does not say by itself which modules are adapted.
        narrowed = any(table.get(key) not in (None, []) for key in ("exclude_modules", "layers_to_transform"))
        listed = targets if isinstance(targets, list) and all(isinstance(name, str) for name in targets) else None
        return cls(
            path=path,
            rank=_whole_number(path, table, "r"),
            lora_alpha=_number(path, "lora_alpha", table.get("lora_alpha", 8)),
            use_rslora=_flag(path, table, "use_rslora"),
            rank_pattern={key: _positive(path, "rank_pattern", n) for key, n in _pattern(path, table, "rank_pattern")},
            alpha_pattern={key: _number(path, "alpha_pattern", n) for key, n in _pattern(path, table, "alpha_pattern")},
            base_model=_text(path, table, "base_model_name_or_path"),
            revision=_text(path, table, "revision"),
            task_type=_text(path, table, "task_type"),
            target_modules=None if listed is None or narrowed else tuple(sorted(listed)),
            peft_version=_text(path, table, "peft_version"),
        )

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """Return alpha / rank of a module, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _read(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
            raise InputError("this is not a regular file", where=str(path), mend="save the adapter anew")
        if status.st_size > _MAX_CONFIG_BYTES:
            raise FileFormatError(
                f"the file is larger than {_MAX_CONFIG_BYTES >> 20} MiB", where=str(path), mend="save the adapter anew"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"the folder has no {CONFIG_FILE}: it is no LoRA adapter",
            where=str(path.parent),
            mend="give a folder that PEFT's save_pretrained or psoups train wrote",
        ) from None
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check its permissions"
        ) from error
    table = parse_json(data, path)
    if not isinstance(table, dict):
        raise _out_of_place(path, f"the file holds a {type(table).__name__}, not an object")
    return table


def _check_init(path: Path, init: Any) -> None:
    if isinstance(init, (bool, str)) and init in _PLAIN_INITS:
        return
    convertible = isinstance(init, str) and init.lower().startswith(_CONVERTIBLE)
    raise _refused(
        path,
        f"init_lora_weights is {init!r}, which is not known to leave the base weights as they are",
        _CONVERSION if convertible else "train the expert with init_lora_weights true, gaussian, eva or orthogonal",
    )


def _check_variants(path: Path, table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if key in _HARMLESS or key in _READ:
            continue
        if key in _PLAIN:
            if not any(type(value) is type(plain) and value == plain for plain in _PLAIN[key]):
                raise _refused(path, f"{key} is {str(value)[:80]}", f"train the expert without {key}")
        # a key that this version has never heard of may stand there as long as it is switched off
        elif value is not None and value is not False and value not in ({}, []):
            raise _refused(
                path, f"the key {key!r} ({str(value)[:80]}) is not known to this version", f"train without {key}"
            )


def _pattern(path: Path, table: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    pattern = table.get(key) or {}
    if not isinstance(pattern, dict):
        raise _out_of_place(path, f"{key} is not a table: {str(pattern)[:80]}")
    for name in pattern:
        if not _PATTERN.fullmatch(name):
            raise _refused(
                path, f"{key} has the regular expression {name[:80]!r}", f"write the modules' names in {key}"
            )
    return list(pattern.items())


def _matching(pattern: Mapping[str, Any], module: str) -> str:
    """Return the first key of a pattern that PEFT would apply to the module (peft.utils.other.get_pattern_key)."""
    for key in pattern:
        if re.match(rf"(.*\.)?({key})$", module):
            return key
    return module


def _whole_number(path: Path, table: Mapping[str, Any], key: str) -> int:
    if key not in table:
        raise _out_of_place(path, f"the key {key!r} is missing")
    return _positive(path, key, table[key])


def _positive(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise _out_of_place(path, f"{key}: {str(value)[:80]!r} is not a positive whole number")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise _out_of_place(path, f"{key}: {str(value)[:80]!r} is not a number")
    return float(value)


def _flag(path: Path, table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise _out_of_place(path, f"{key}: {str(value)[:80]!r} is neither true nor false")
    return value


def _text(path: Path, table: Mapping[str, Any], key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise _out_of_place(path, f"{key}: {str(value)[:80]!r} is not text")
    return value


def _refused(path: Path, what: str, mend: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(f"{what}: this version does not merge such an adapter", where=str(path), mend=mend)


def _out_of_place(path: Path, what: str) -> FileFormatError:
    return FileFormatError(what, where=str(path), mend="save the adapter again with PEFT's save_pretrained")
