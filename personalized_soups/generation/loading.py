"""Load a base model, its tokenizer and an adapter through transformers and PEFT, with errors that name the fix."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from personalized_soups.adapters.compatible import is_same_base
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import BaseRecord, read_expert_record, read_soup_record
from personalized_soups.errors import FileFormatError, IncompatibleExpertsError, InputError, UsageError, choose_from
from personalized_soups.files.file_names import CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.generation.base_location import find_base, first_line
from personalized_soups.generation.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16", "auto"]

# Options of from_pretrained that decide where on the hub, or in its cache, to look for a model.
_PLACES = ("cache_dir", "local_files_only", "revision", "token")

# transformers checks few files before it uses them, so a damaged file raises any of these.
_LOADING_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer. A tokenizer without a padding token pads with its end token.

    Raises:
        InputError: if the tokenizer can't be found or has no end token.
    """
    from transformers import AutoTokenizer

    place = find_base(base)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(base), **place)
    except _LOADING_FAULTS as fault:
        raise _no_base(base, "tokenizer", fault) from fault
    if tokenizer.eos_token is None:
        raise InputError(
            "the tokenizer has no end token, so no answer could end",
            where=str(base),
            mend="set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(base: str | Path, *, device: torch.device, dtype: Dtype = "float32", **options: Any) -> PreTrainedModel:
    """Load a causal language model from safetensors files.

    Args:
        base: a folder or a hub id.
        device: for the model. Ignored with a `quantization_config` or a `device_map`: transformers then places it.
        dtype: of the model; `auto` is the dtype of its files.
        options: for transformers' from_pretrained.

    Raises:
        InputError: if there is no such model, it has pickle files only, or tensors are missing.
        FileFormatError: if a safetensors file of its folder is damaged.
        UsageError: for an unknown dtype.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in get_args(Dtype):
        raise UsageError(f"unknown dtype {dtype!r}", where="dtype", mend=choose_from(str(dtype), get_args(Dtype)))
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
    # transformers fills missing tensors with random numbers, and says so only in a log that we silence.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"the model's files lack {len(missing)} tensors, the first is {missing[0]}",
            where=str(base),
            mend="copy or download the model again",
        )
    is_placed = {"quantization_config", "device_map"} & options.keys()
    moved: PreTrainedModel = model if is_placed else model.to(device)
    return moved


def load_adapter(model: PreTrainedModel, folder: str | Path, *, fold: bool) -> Any:
    """Return the model with an adapter: wrapped by PEFT, or folded into the weights of `model`, which then change.

    Raises:
        FileFormatError: if the folder holds no adapter, a file of it is damaged, or its tensors are in a pickle file.
        IncompatibleExpertsError: if the adapter does not fit the model: other modules or other shapes.
        InputError: if a value of the adapter is NaN or infinite.
    """
    from peft import PeftModel

    folder = Path(folder)
    check_adapter_folder(folder)
    file = SafetensorsFile.open(folder / WEIGHTS_FILE)
    try:
        with quiet_transformers():
            # PEFT only warns of missing tensors; `_check_adapter` raises.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    except (ValueError, KeyError, TypeError, RuntimeError) as fault:
        raise IncompatibleExpertsError(
            f"the adapter can't be put on this base: {first_line(fault)}",
            where=str(folder),
            mend="give the base that it was trained on",
        ) from fault
    _check_adapter(adapted, file)
    with quiet_transformers():
        return adapted.merge_and_unload() if fold else adapted


def check_same_base(base: str | Path, adapter: Path) -> None:
    """Raise IncompatibleExpertsError if expert.json or soup.json in `adapter` records another base than `base`."""
    record = read_expert_record(adapter) or read_soup_record(adapter)
    if record is None or record.base.fingerprint is None:
        return
    actual = BaseRecord(fingerprint=base_fingerprint(base))
    if not is_same_base(record.base, actual):
        raise IncompatibleExpertsError(
            f"the adapter was trained on {record.base.name or 'another base'} (fingerprint "
            f"{record.base.fingerprint[:12]}), but this base has the fingerprint {str(actual.fingerprint)[:12]}",
            where=str(adapter),
            mend="give the base that it was trained on; if both are one base in different dtypes, pass same_base=True",
        )


def _check_adapter(adapted: Any, file: SafetensorsFile) -> None:
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(expected.keys() - file.entries.keys())
    strange = sorted(name for name in file.entries.keys() - expected.keys() if "lora_" in name)
    if missing or strange:
        problem = f"lacks {missing[0]}" if missing else f"has {strange[0]}, for which the base has no module"
        raise IncompatibleExpertsError(
            f"the adapter's file {problem}",
            where=str(file.path),
            mend="give the base that it was trained on, and the whole adapter folder",
        )
    for name, tensor in expected.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name} holds a value that is NaN or infinite",
                where=str(file.path),
                mend="this adapter's training diverged or its file is damaged: train it again",
            )


def check_adapter_folder(folder: Path) -> None:
    """Raise FileFormatError unless `folder` holds a PEFT adapter in safetensors."""
    if not (folder / CONFIG_FILE).is_file():
        raise FileFormatError(
            f"the folder holds no adapter: {CONFIG_FILE} is missing",
            where=str(folder),
            mend=f"give the folder that holds {CONFIG_FILE}, e.g. one written by psoups train or psoups merge",
        )
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / PICKLED_WEIGHTS_FILE).is_file()
        raise FileFormatError(
            "the adapter's tensors are in a pickle file, which is never loaded"
            if pickled
            else f"{WEIGHTS_FILE} is missing",
            where=str(folder),
            mend="load it with PEFT where you trust it and save it again with save_pretrained(folder)"
            if pickled
            else "copy the whole adapter folder",
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
        raise fault  # the disk is full: nothing is wrong with the base
    return InputError(
        f"the {part} can't be loaded: {first_line(fault)}",
        where=str(base),
        mend="give a model folder (config.json, safetensors, tokenizer) or a hub id that this machine can reach",
    )
