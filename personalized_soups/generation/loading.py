"""Load a base model, its tokenizer and an adapter with transformers and PEFT. Each error says how to fix its cause."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.compatible import is_same_base, unlike
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.provenance import (
    BaseAdapterRecord,
    BaseRecord,
    read_expert_record,
    read_soup_record,
)
from personalized_soups.bases.place import place_of
from personalized_soups.errors import FileFormatError, IncompatibleExpertsError, InputError, UsageError, choose_from
from personalized_soups.files.file_names import CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.generation.base_location import find_base, first_line
from personalized_soups.generation.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16", "auto"]

# Options of from_pretrained that decide where to look for a model, on the hub or in the hub's local cache.
_PLACES = ("cache_dir", "local_files_only", "revision", "token")

# transformers checks few files before it uses them, so a damaged file may raise any of these errors.
_LOADING_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer. If it has no padding token, its end token becomes the padding token.

    Raises:
        InputError: if the tokenizer can't be found or has no end token.
    """
    from transformers import AutoTokenizer

    base = place_of(base)
    place = find_base(base)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(base), **place)
    except _LOADING_FAULTS as fault:
        raise _no_base(base, "tokenizer", fault) from fault
    if tokenizer.eos_token is None:
        raise InputError(
            "the tokenizer has no end token, so answers would never end",
            where=str(base),
            mend='set "eos_token" in tokenizer_config.json, e.g. to "</s>"',
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    base: str | Path,
    *,
    device: torch.device,
    dtype: Dtype = "float32",
    on: BaseAdapter | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal language model from safetensors files.

    Args:
        base: the name of a named base, a folder, a GGUF file or a hub id.
        device: the model's device. With a `quantization_config` or a `device_map` in `options`, transformers places
            the model, and `device` is ignored.
        dtype: the dtype of the model; `auto` takes the dtype of its files.
        on: an adapter whose delta is added to the weights, with weight 1.
        options: further arguments of transformers' from_pretrained.

    Raises:
        InputError: if the model does not exist, has only pickle files, or lacks tensors.
        FileFormatError: if a safetensors file in the model's folder is damaged.
        UsageError: if the dtype is unknown.
        IncompatibleExpertsError: if the folder of `on` records another base.
        SoupError: all errors of `add_adapter`.
    """
    from transformers import AutoModelForCausalLM

    from personalized_soups.generation.added_adapter import add_adapter

    if dtype not in get_args(Dtype):
        raise UsageError(
            f"{dtype!r} is not a valid dtype", where="dtype", mend=choose_from(str(dtype), get_args(Dtype))
        )
    base = place_of(base)
    options |= find_base(base, **{name: options[name] for name in _PLACES if name in options})
    for file in sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []:
        SafetensorsFile.open(file)
    torch_dtype: str | torch.dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(base), dtype=torch_dtype, use_safetensors=True, output_loading_info=True, **options
            )
            model, info = loaded
    except _LOADING_FAULTS as fault:
        raise _no_base(base, "model", fault) from fault
    # transformers fills missing tensors with random numbers. It only logs a warning, which we silence.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"the model's files lack {len(missing)} of its tensors; the first is {missing[0]}",
            where=str(base),
            mend="copy or download the model again",
        )
    if on is not None:
        # only now, because a base of the hub has a fingerprint only after its download
        on.check_base(base)
        add_adapter(model, on)
    is_placed = {"quantization_config", "device_map"} & options.keys()
    moved: PreTrainedModel = model if is_placed else model.to(device)
    return moved


def load_adapter(model: PreTrainedModel, folder: str | Path, *, fold: bool) -> Any:
    """Return the model with an adapter.

    With `fold`, the adapter is added to the weights of `model` in place. Otherwise PEFT wraps `model`.

    Raises:
        FileFormatError: if the folder holds no adapter, one of its files is damaged, or its tensors are in a pickle
            file.
        IncompatibleExpertsError: if the modules or shapes of the adapter do not fit the model.
        InputError: if a value of the adapter is NaN or infinite.
    """
    from peft import PeftModel

    folder = Path(folder)
    check_adapter_folder(folder)
    file = SafetensorsFile.open(folder / WEIGHTS_FILE)
    try:
        with quiet_transformers():
            # PEFT only warns about missing tensors, but `_check_adapter` raises an error.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    except (ValueError, KeyError, TypeError, RuntimeError) as fault:
        raise IncompatibleExpertsError(
            f"the adapter can't be put on this base: {first_line(fault)}",
            where=str(folder),
            mend="give the base that the adapter was trained on",
        ) from fault
    _check_adapter(adapted, file)
    with quiet_transformers():
        return adapted.merge_and_unload() if fold else adapted


def check_same_base(base: str | Path, adapter: Path) -> None:
    """Raise IncompatibleExpertsError if expert.json or soup.json in `adapter` records a base other than `base`."""
    record = read_expert_record(adapter) or read_soup_record(adapter)
    if record is None or record.base.fingerprint is None:
        return
    actual = BaseRecord(fingerprint=base_fingerprint(base))
    if not is_same_base(record.base, actual):
        raise IncompatibleExpertsError(
            f"the adapter was trained on {record.base.name or 'another base'} (fingerprint "
            f"{record.base.fingerprint[:12]}), but this base has the fingerprint {str(actual.fingerprint)[:12]}",
            where=str(adapter),
            mend="give the base that the adapter was trained on; or, if this is the same base in another dtype, pass "
            "same_base=True",
        )


def check_same_adapter(adapter: Path, on: BaseAdapterRecord | None) -> None:
    """Raise IncompatibleExpertsError if expert.json or soup.json in `adapter` records another base adapter than `on`.

    Args:
        adapter: the folder of an expert or a soup.
        on: the base adapter that the base is loaded with, or None.
    """
    for fault in unlike([Expert(adapter.resolve().name, adapter)], on):
        raise fault


def _check_adapter(adapted: Any, file: SafetensorsFile) -> None:
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(expected.keys() - file.entries.keys())
    strange = sorted(name for name in file.entries.keys() - expected.keys() if "lora_" in name)
    if missing or strange:
        problem = (
            f"lacks the tensor {missing[0]}"
            if missing
            else f"has the tensor {strange[0]}, but the base has no module for it"
        )
        raise IncompatibleExpertsError(
            f"the adapter file {problem}",
            where=str(file.path),
            mend="give the base that the adapter was trained on, and copy the adapter folder with all its files",
        )
    for name, tensor in expected.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the tensor {name} has a value that is NaN or infinite",
                where=str(file.path),
                mend="train the adapter again: its training diverged, or its file is damaged",
            )


def check_adapter_folder(folder: Path) -> None:
    """Raise FileFormatError unless `folder` holds a PEFT adapter in a safetensors file."""
    if not (folder / CONFIG_FILE).is_file():
        raise FileFormatError(
            f"the folder holds no adapter: {CONFIG_FILE} is missing",
            where=str(folder),
            mend=f"give a folder with {CONFIG_FILE}, e.g. a folder that psoups train or psoups merge has written",
        )
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / PICKLED_WEIGHTS_FILE).is_file()
        raise FileFormatError(
            "the adapter's tensors are in a pickle file, which is never loaded"
            if pickled
            else f"the file {WEIGHTS_FILE} is missing",
            where=str(folder),
            mend="if you trust the file, load it with PEFT and save it again with save_pretrained(folder)"
            if pickled
            else "copy the adapter folder again, with all its files",
        )
    try:
        is_object = isinstance(json.loads((folder / CONFIG_FILE).read_bytes()), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise FileFormatError(
            "the adapter's configuration is not a JSON object",
            where=str(folder / CONFIG_FILE),
            mend="copy the adapter folder again",
        )


def _no_base(base: str | Path, part: str, fault: Exception) -> InputError:
    if isinstance(fault, OSError) and fault.errno in {errno.ENOSPC, errno.EDQUOT}:
        raise fault  # The disk is full, so the base is not at fault.
    return InputError(
        f"the {part} can't be loaded: {first_line(fault)}",
        where=str(base),
        mend="give a model folder (config.json, safetensors, tokenizer) or a hub id that this machine can reach",
    )
