"""Loading a base model, its tokenizer and an adapter through transformers and PEFT, with errors a reader can act on."""

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
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.generation.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"

# What transformers raises for files that are not what they should be: whatever its reading happens to stumble over.
_LOADING_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def choose_device(device: str) -> torch.device:
    """Return the device that `device` names; `auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        UsageError: if the name means nothing, or a device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}", where="device", mend="choose auto, cpu or cuda") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"the device {device!r} is asked for, torch sees {torch.cuda.device_count()} CUDA devices",
            where="device",
            mend="use --device cpu, or install a torch that knows this machine's GPU",
        )
    try:
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, NotImplementedError, AssertionError) as fault:
        raise UsageError(
            f"the device {device!r} can't compute: {_first_line(fault)}",
            where="device",
            mend="choose auto, cpu or cuda",
        ) from fault
    return chosen


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer; one without a padding token pads with its end token.

    Raises:
        InputError: if it can't be found or has no end token.
    """
    from transformers import AutoTokenizer

    check_base(base)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(base))
    except _LOADING_FAULTS as fault:
        raise _no_base(base, "tokenizer", fault) from fault
    if tokenizer.eos_token is None:
        raise InputError(
            "the tokenizer has no end token, so that no answer could end",
            where=str(base),
            mend="set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(base: str | Path, *, device: torch.device, dtype: Dtype = "float32", **options: Any) -> PreTrainedModel:
    """Return the causal language model of a folder or a hub id, on `device`, from safetensors files only.

    `options` are further ones of transformers' from_pretrained. Where a `quantization_config` or `device_map` is among
    them, transformers alone says where the model stands.

    Raises:
        InputError: if there is no such model, it holds its tensors in pickle files only, or not all of them.
        FileFormatError: if a safetensors file of its folder is truncated or lies.
    """
    from transformers import AutoModelForCausalLM

    check_base(base)
    if dtype not in get_args(Dtype):
        raise UsageError(f"unknown dtype {dtype!r}", where="dtype", mend=choose_from(str(dtype), get_args(Dtype)))
    for file in sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []:
        SafetensorsFile.open(file)
    wanted: str | torch.dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(base), dtype=wanted, use_safetensors=True, output_loading_info=True, **options
            )
            model, told = loaded
    except _LOADING_FAULTS as fault:
        raise _no_base(base, "model", fault) from fault
    if told["missing_keys"]:  # transformers fills them with random numbers, and says so where we keep it quiet
        missing = sorted(told["missing_keys"])
        raise InputError(
            f"the model's files lack {len(missing)} tensors, the first is {missing[0]}",
            where=str(base),
            mend="copy or download the model again",
        )
    is_placed = {"quantization_config", "device_map"} & options.keys()
    moved: PreTrainedModel = model if is_placed else model.to(device)
    return moved


def load_adapter(model: PreTrainedModel, folder: str | Path, *, fold: bool) -> Any:
    """Return `model` with the adapter of `folder`: wrapped by PEFT, or folded into its weights (which changes `model`).

    Raises:
        FileFormatError: if the folder is no adapter folder, a file of it is damaged, or it holds its tensors in a
            pickle file only.
        IncompatibleExpertsError: if the adapter is another model's: other modules or other shapes.
        InputError: if a value of it is NaN or infinite.
    """
    from peft import PeftModel

    folder = Path(folder)
    check_adapter_folder(folder)
    file = SafetensorsFile.open(folder / ADAPTER_TENSORS)
    try:
        with quiet_transformers():
            # of tensors that are missing PEFT only warns; they are counted below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    except (ValueError, KeyError, TypeError, RuntimeError) as fault:
        raise IncompatibleExpertsError(
            f"the adapter can't be put on this base: {_first_line(fault)}",
            where=str(folder),
            mend="give the base that it was trained on",
        ) from fault
    _check_adapter(adapted, file)
    with quiet_transformers():
        return adapted.merge_and_unload() if fold else adapted


def check_same_base(base: str | Path, adapter: Path) -> None:
    """Raise IncompatibleExpertsError where expert.json or soup.json in `adapter` records another base than `base`."""
    record = read_expert_record(adapter) or read_soup_record(adapter)
    if record is None or record.base.fingerprint is None:
        return
    found = BaseRecord(fingerprint=base_fingerprint(base))
    if not is_same_base(record.base, found):
        raise IncompatibleExpertsError(
            f"the adapter was trained on {record.base.name or 'another base'} ({record.base.fingerprint[:12]}), "
            f"this base is another one ({str(found.fingerprint)[:12]})",
            where=str(adapter),
            mend="give the base that it was trained on; if the two are one base in other numbers, pass --same-base",
        )


def _check_adapter(adapted: Any, file: SafetensorsFile) -> None:
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(wanted.keys() - file.entries.keys())
    strange = sorted(name for name in file.entries.keys() - wanted.keys() if "lora_" in name)
    if missing or strange:
        told = f"lacks {missing[0]}" if missing else f"has {strange[0]}, for which the base has no place"
        raise IncompatibleExpertsError(
            f"the adapter's file {told}",
            where=str(file.path),
            mend="give the base that it was trained on, and the whole adapter folder",
        )
    for name, tensor in wanted.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name} holds a value that is NaN or infinite",
                where=str(file.path),
                mend="this adapter's training diverged or its file is damaged: train it again",
            )


def check_adapter_folder(folder: Path) -> None:
    """Raise FileFormatError unless `folder` holds a PEFT adapter in safetensors."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileFormatError(
            f"no adapter here: {ADAPTER_CONFIG} is missing",
            where=str(folder),
            mend="give the folder that holds adapter_config.json, e.g. one written by psoups train or psoups merge",
        )
    if not (folder / ADAPTER_TENSORS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise FileFormatError(
            "the adapter's tensors are in a pickle file, which is never loaded"
            if pickled
            else f"{ADAPTER_TENSORS} is missing",
            where=str(folder),
            mend="load it with PEFT where you trust it and save it again with save_pretrained(folder)"
            if pickled
            else "copy the whole adapter folder",
        )
    try:
        sound = isinstance(json.loads((folder / ADAPTER_CONFIG).read_bytes()), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise FileFormatError(
            "the adapter's configuration is not a JSON object",
            where=str(folder / ADAPTER_CONFIG),
            mend="copy the adapter folder again",
        )


def check_base(base: str | Path) -> None:
    """Raise InputError if `base` is a folder that can hold no model, or a path (not a hub id) that is not there."""
    folder = Path(base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                "no model here: config.json is missing",
                where=str(base),
                mend="give the folder that holds config.json and the safetensors files",
            )
    elif isinstance(base, Path) or str(base).startswith((".", "/", "~")) or str(base).count("/") > 1:
        raise InputError(
            "there is no such folder", where=str(base), mend="check the path, or give a hub id: owner/name"
        )


def _no_base(base: str | Path, part: str, fault: Exception) -> InputError:
    if isinstance(fault, OSError) and fault.errno in {errno.ENOSPC, errno.EDQUOT}:
        raise fault  # while downloading; nothing is wrong with the base
    return InputError(
        f"the {part} can't be loaded: {_first_line(fault)}",
        where=str(base),
        mend="give a model folder (config.json, safetensors, tokenizer) or a hub id that this machine can reach",
    )


def _first_line(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])[:200] if lines else type(fault).__name__
