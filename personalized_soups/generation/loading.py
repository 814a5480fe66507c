"""Loading a base model, its tokenizer and an adapter through transformers and PEFT, with errors a reader can act on."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from personalized_soups.adapters.compatible import is_same_base
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import BaseRecord, read_expert_record, read_soup_record
from personalized_soups.errors import FileFormatError, IncompatibleExpertsError, InputError, UsageError, choose_from
from personalized_soups.files.file_names import CONFIG_FILE, MODEL_CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.regular import check_no_lfs_pointers
from personalized_soups.generation.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16", "auto"]

# Options of from_pretrained that decide where on the hub, or in its cache, a model is looked for.
_PLACES = ("cache_dir", "local_files_only", "revision", "token")

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
            mend="use device=cpu, or install a torch that knows this machine's GPU",
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

    place = check_base(base)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(base), **place)
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

    if dtype not in get_args(Dtype):
        raise UsageError(f"unknown dtype {dtype!r}", where="dtype", mend=choose_from(str(dtype), get_args(Dtype)))
    options |= check_base(base, **{name: options[name] for name in _PLACES if name in options})
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
    file = SafetensorsFile.open(folder / WEIGHTS_FILE)
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
            mend="give the base that it was trained on; if the two are one base in other numbers, pass same_base=True",
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
    if not (folder / CONFIG_FILE).is_file():
        raise FileFormatError(
            f"no adapter here: {CONFIG_FILE} is missing",
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
        sound = isinstance(json.loads((folder / CONFIG_FILE).read_bytes()), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise FileFormatError(
            "the adapter's configuration is not a JSON object",
            where=str(folder / CONFIG_FILE),
            mend="copy the adapter folder again",
        )


def check_base(base: str | Path, **place: Any) -> dict[str, Any]:
    """Raise InputError if `base` is no folder with a model, and no model that the hub or its local cache has.

    A folder is looked for first, then the cache; the hub is asked once, where transformers would ask for half a minute
    and longer. Return options for from_pretrained: `local_files_only` where the cache must do, as the hub does not
    answer. `place` are from_pretrained's own of `_PLACES`.
    """
    folder = Path(base)
    if os.path.isdir(base):  # noqa: PTH112 # Path.is_dir() raises where the name is too long
        if not (folder / MODEL_CONFIG_FILE).is_file():
            raise InputError(
                "no model here: config.json is missing",
                where=str(base),
                mend="give the folder that holds config.json and the safetensors files",
            )
        check_no_lfs_pointers(folder)
        return {}
    if isinstance(base, Path) or str(base).startswith((".", "/", "~")) or str(base).count("/") > 1:
        raise InputError(
            "there is no such folder", where=str(base), mend="check the path, or give a hub id: owner/name"
        )
    return _check_hub(base, **place)


def _check_hub(
    base: str,
    *,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache

    # httpx's or httpx2's, by the version of huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        is_cached = isinstance(
            try_to_load_from_cache(base, MODEL_CONFIG_FILE, cache_dir=cache_dir, revision=revision), str
        )
        url = hf_hub_url(base, MODEL_CONFIG_FILE, revision=revision)
    except HFValidationError as fault:
        raise InputError(
            "there is no such folder, and the name is no hub id",
            where=base,
            mend="check the path, or give a hub id: owner/name",
        ) from fault
    if local_files_only or is_offline_mode():
        if is_cached:
            return {}
        name = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        raise _unreachable(base, url, f"{name} keeps this run from the Hugging Face hub")
    try:
        # one try, unlike transformers' own
        get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OSError) as fault:
        refusal = _refusal(base, url, fault)
        if is_cached:
            return {} if refusal else {"local_files_only": True}
        if refusal is None:
            refusal = _unreachable(base, url, f"the Hugging Face hub can't be reached: {_first_line(fault)}")
        raise refusal from fault
    return {}


def _refusal(base: str, url: str, fault: Exception) -> InputError | None:
    """Return the error for a hub that has answered, and does not give the model; None where it has not answered."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    mend = "check the path, or the hub id: owner/name"
    if isinstance(fault, GatedRepoError):
        what = "the hub gives this model only to those who have accepted its conditions"
        mend = f"give a model folder; or accept the conditions at {_page(base, url)}, then run: hf auth login"
    elif isinstance(fault, RepositoryNotFoundError):
        what = "there is no such folder, and the hub has no such model, or a private one"
        mend = f"{mend}; for a private model run: hf auth login"
    elif isinstance(fault, EntryNotFoundError):
        what = "there is no such folder, and the hub's files of that name hold no config.json"
    elif isinstance(fault, HfHubHTTPError) and fault.response.status_code < 500:
        what = f"there is no such folder, and the hub refuses the model: {_first_line(fault)}"
    else:
        return None
    return InputError(what, where=base, mend=mend)


def _unreachable(base: str, url: str, reason: str) -> InputError:
    return InputError(
        f"there is no such folder, no such model in the local cache, and {reason}",
        where=base,
        mend="give a model folder (config.json, safetensors, tokenizer); or, for a hub id (owner/name), run where "
        f"{_page(base, url)} can be reached, or download it there and copy the folder: hf download {base}",
    )


def _page(base: str, url: str) -> str:
    return f"{url.partition(f'/{base}/')[0]}/{base}"


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
