"""The configuration of a LoRA adapter, adapter_config.json.

Only the settings in variants.py are accepted. An adapter with any other setting is rejected with the setting's name,
because a merge could give wrong results.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from personalized_soups.adapters.names import is_wrapped, without_wrappers
from personalized_soups.adapters.patterns import Patterns
from personalized_soups.adapters.variants import HARMLESS, MOVING_INITS, OTHER_INIT, PLAIN_INITS, READ, REFUSED
from personalized_soups.errors import FileFormatError, InputError, UnsupportedAdapterError
from personalized_soups.files.file_names import CONFIG_FILE
from personalized_soups.files.strict_json import parse_json

_MAX_CONFIG_BYTES = 16 << 20

# The default of PEFT's LoraConfig.
_DEFAULT_RANK = 8

# The maximum number of names in a list. Each name is compared with every tensor of the adapter.
_MAX_NAMES = 1000

Biases = Literal["none", "all", "lora_only"]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The parts of a LoRA configuration that decide what the saved tensors mean.

    Attributes:
        path: the path of adapter_config.json.
        rank: the rank of all modules that rank_pattern does not match (`r`).
        lora_alpha: the alpha of all modules that alpha_pattern does not match.
        use_rslora: whether the scaling is alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern: the ranks of some modules. The keys are regular expressions for the modules' names.
        alpha_pattern: the alphas of some modules. The keys are regular expressions for the modules' names.
        base_model: the base model's path or hub id.
        revision: the base model's revision on the hub.
        task_type: PEFT's task type, such as `CAUSAL_LM`.
        target_modules: the names of the adapted modules, or None if the file does not have them as a plain list.
        peft_version: the version of PEFT that saved the adapter.
        fan_in_fan_out: whether the layer that PEFT wrapped last stores its weight as [in, out] (Conv1D).
        bias: which biases of the base were trained.
        lora_bias: whether B has a bias.
        use_dora: whether the adapter is DoRA (arXiv 2402.09353).
        modules_to_save: the names of modules that were trained whole.
        trainable_tokens: the tokens whose embedding rows were trained: one tuple for all embeddings, or a tuple for
            each module name.
        target_parameters: the names of adapted parameters that are not modules.
        ensure_weight_tying: whether PEFT saved the change of a tied embedding twice.
    """

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
    fan_in_fan_out: bool
    bias: Biases
    lora_bias: bool
    use_dora: bool
    modules_to_save: tuple[str, ...]
    trainable_tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    target_parameters: tuple[str, ...]
    ensure_weight_tying: bool
    _rank_keys: Patterns = field(repr=False, compare=False)
    _alpha_keys: Patterns = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read and check `adapter_config.json` in `folder`.

        Raises:
            InputError: if the file is missing or cannot be read.
            FileFormatError: if the file is not JSON, or a value is invalid.
            UnsupportedAdapterError: if the adapter is a variant of LoRA that this version cannot merge. The error names
                the first such setting.
        """
        path = Path(folder) / CONFIG_FILE
        table = _read(path)
        kind = table.get("peft_type")
        if kind != "LORA":
            raise _refused(path, f"peft_type is {kind!r}, not 'LORA'", "give a LoRA adapter")
        _check_init(path, table.get("init_lora_weights", True))
        _check_variants(path, table)
        rank_pattern, rank_keys = _pattern(path, table, "rank_pattern")
        alpha_pattern, alpha_keys = _pattern(path, table, "alpha_pattern")
        return cls(
            path=path,
            rank=_positive(path, "r", table.get("r", _DEFAULT_RANK)),
            lora_alpha=_number(path, "lora_alpha", table.get("lora_alpha", 8)),
            use_rslora=_flag(path, table, "use_rslora"),
            rank_pattern={key: _positive(path, "rank_pattern", value) for key, value in rank_pattern.items()},
            alpha_pattern={key: _number(path, "alpha_pattern", value) for key, value in alpha_pattern.items()},
            base_model=_text(path, table, "base_model_name_or_path"),
            revision=_text(path, table, "revision"),
            task_type=_text(path, table, "task_type"),
            target_modules=_targets(table),
            peft_version=_text(path, table, "peft_version"),
            fan_in_fan_out=_flag(path, table, "fan_in_fan_out"),
            bias=_biases(path, table),
            lora_bias=_flag(path, table, "lora_bias"),
            use_dora=_flag(path, table, "use_dora"),
            modules_to_save=_names(path, table, "modules_to_save"),
            trainable_tokens=_tokens(path, table.get("trainable_token_indices")),
            target_parameters=_names(path, table, "target_parameters"),
            ensure_weight_tying=_flag(path, table, "ensure_weight_tying"),
            _rank_keys=rank_keys,
            _alpha_keys=alpha_keys,
        )

    def rank_of(self, module: str) -> int:
        """Return the configured rank of a module.

        Args:
            module: the module's name. For a parameter, its full name.

        Raises:
            UnsupportedAdapterError: if the search in rank_pattern takes too long.
        """
        key = self._first(self._rank_keys, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling_of(self, module: str) -> float:
        """Return a module's scaling: alpha / rank, or alpha / sqrt(rank) if the adapter uses rsLoRA (arXiv 2312.03732).

        Raises:
            UnsupportedAdapterError: if the search in rank_pattern or alpha_pattern takes too long.
        """
        key = self._first(self._alpha_keys, module)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _first(self, keys: Patterns, module: str) -> str | None:
        try:
            return keys.first(module)
        except ValueError as error:
            raise _refused(
                self.path,
                str(error),
                "write full module names instead of regular expressions in rank_pattern and alpha_pattern",
            ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait forever
            raise InputError(
                f"{path.name} is not a regular file",
                where=str(path),
                mend="save the adapter again with PEFT's save_pretrained",
            )
        if status.st_size > _MAX_CONFIG_BYTES:
            raise FileFormatError(
                f"the file is larger than the maximum of {_MAX_CONFIG_BYTES >> 20} MiB",
                where=str(path),
                mend="save the adapter again",
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"the folder is not a LoRA adapter: it has no {CONFIG_FILE}",
            where=str(path.parent),
            mend="give a folder written by PEFT's save_pretrained or by psoups train",
        ) from None
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check its permissions"
        ) from error
    table = parse_json(data, path)
    if not isinstance(table, dict):
        raise _out_of_place(path, f"the file contains a {type(table).__name__}, but a JSON object was expected")
    return table


def _check_init(path: Path, init: Any) -> None:
    # like PEFT: a falsy value means no initialisation, and gaussian may be in upper case
    if init is None or (isinstance(init, (bool, str)) and init in PLAIN_INITS):
        return
    if init == 0 or (isinstance(init, str) and init.lower() == "gaussian"):
        return
    mends = [mend for name, mend in MOVING_INITS.items() if isinstance(init, str) and init.lower().startswith(name)]
    raise _refused(
        path,
        f"init_lora_weights is {init!r}, which may change the base weights",
        mends[0] if mends else OTHER_INIT,
    )


def _check_variants(path: Path, table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if key in HARMLESS or key in READ:
            continue
        if refusal := REFUSED.get(key):
            if not any(type(value) is type(off) and value == off for off in refusal.off):
                raise _refused(path, f"{key} is {str(value)[:80]} ({refusal.name}: {refusal.why})", refusal.mend)
        # an unknown key of a newer PEFT is accepted only if its value switches it off
        elif value is not None and value is not False and value not in ({}, []):
            raise _refused(
                path, f"the key {key!r} (value {str(value)[:80]}) is unknown", f"train the expert without {key}"
            )


def _targets(table: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names in target_modules, or None if other settings also decide which modules are adapted."""
    targets = table.get("target_modules")
    narrowed = any(table.get(key) not in (None, []) for key in ("exclude_modules", "layers_to_transform"))
    if narrowed or not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        return None
    # a name with a training tool's wrapper (_orig_mod) is not the name of a module in the base
    return None if any(map(is_wrapped, targets)) else tuple(sorted(targets))


def _pattern(path: Path, table: Mapping[str, Any], key: str) -> tuple[dict[str, Any], Patterns]:
    pattern = table.get(key) or {}
    if not isinstance(pattern, dict):
        raise _out_of_place(path, f"{key} is {str(pattern)[:80]!r}, but a JSON object was expected")
    try:
        return pattern, Patterns(pattern)
    except ValueError as error:
        raise _refused(
            path, f"{key}: {error}", f"write full module names instead of regular expressions in {key}"
        ) from None


def _biases(path: Path, table: Mapping[str, Any]) -> Biases:
    value = table.get("bias") or "none"
    for known in get_args(Biases):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise _refused(
        path,
        f"bias is {str(value)[:80]!r}, not none, all or lora_only",
        "train the expert with bias none, all or lora_only",
    )


def _names(path: Path, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise _out_of_place(path, f"{key} is {str(value)[:80]!r}, but a list of names was expected")
    if len(value) > _MAX_NAMES:
        raise _out_of_place(path, f"{key} has {len(value)} names, but at most {_MAX_NAMES} are allowed")
    return tuple(map(without_wrappers, value))


def _tokens(path: Path, value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if isinstance(value, dict) and len(value) <= _MAX_NAMES:
        return {module: _indices(path, indices) for module, indices in value.items()}
    return _indices(path, value or [])


def _indices(path: Path, value: Any) -> tuple[int, ...]:
    key = "trainable_token_indices"
    if not isinstance(value, list) or not all(type(index) is int and 0 <= index < 1 << 31 for index in value):
        raise _out_of_place(path, f"{key} is {str(value)[:80]!r}, but a list of token ids was expected")
    if len(set(value)) != len(value):
        raise _out_of_place(path, f"{key} lists a token more than once: {str(value)[:80]}")
    return tuple(value)


def _positive(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise _out_of_place(path, f"{key} is {str(value)[:80]!r}, but a positive integer was expected")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise _out_of_place(path, f"{key} is {str(value)[:80]!r}, but a number between -1e30 and 1e30 was expected")
    return float(value)


def _flag(path: Path, table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key)
    if value is None or (type(value) is int and value in {0, 1}):  # PEFT accepts null, 0 and 1, too
        return bool(value)
    if not isinstance(value, bool):
        raise _out_of_place(path, f"{key} is {str(value)[:80]!r}, but true or false was expected")
    return value


def _text(path: Path, table: Mapping[str, Any], key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise _out_of_place(path, f"{key} is {str(value)[:80]!r}, but a string was expected")
    return value


def _refused(path: Path, what: str, mend: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(f"{what}, so this version cannot merge the adapter", where=str(path), mend=mend)


def _out_of_place(path: Path, what: str) -> FileFormatError:
    return FileFormatError(what, where=str(path), mend="save the adapter again with PEFT's save_pretrained")
