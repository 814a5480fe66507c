"""Loading a base model, its tokenizer and an adapter through transformers and PEFT, with errors a reader can act on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from personalized_soups.errors import FileFormatError, InputError, UsageError
from personalized_soups.generation.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"


def choose_device(device: str) -> torch.device:
    """Return the device that `device` names; `auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        UsageError: if the name means nothing, or a CUDA device that is not there.
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
    except (OSError, ValueError) as fault:
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


def load_base(base: str | Path, *, device: torch.device, dtype: Dtype = "float32") -> PreTrainedModel:
    """Return the causal language model of a folder or a hub id, on `device`, from safetensors files only.

    Raises:
        InputError: if there is no such model, or it holds its tensors in pickle files only.
    """
    from transformers import AutoModelForCausalLM

    check_base(base)
    wanted: str | torch.dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=wanted, use_safetensors=True)
    except (OSError, ValueError) as fault:
        raise _no_base(base, "model", fault) from fault
    moved: PreTrainedModel = model.to(device)
    return moved


def load_adapter(model: PreTrainedModel, folder: str | Path, *, fold: bool) -> Any:
    """Return `model` with the adapter of `folder`: wrapped by PEFT, or folded into its weights (which changes `model`).

    Raises:
        FileFormatError: if the folder is no adapter folder, or holds its tensors in a pickle file only.
    """
    from peft import PeftModel

    folder = Path(folder)
    check_adapter_folder(folder)
    with quiet_transformers():
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        return adapted.merge_and_unload() if fold else adapted


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
    reason = str(fault).strip().splitlines()[0]
    return InputError(
        f"the {part} can't be loaded: {reason}",
        where=str(base),
        mend="give a model folder (config.json, safetensors, tokenizer) or a hub id that this machine can reach",
    )
