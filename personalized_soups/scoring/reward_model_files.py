"""Load reward models: sequence classifiers of transformers with one output, and LoRA adapters of such classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import read_expert_record
from personalized_soups.bases.place import place_of
from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.generation.base_location import find_base, first_line
from personalized_soups.generation.loading import Dtype
from personalized_soups.generation.quiet import quiet_transformers

# transformers checks few files before it uses them, so a damaged file may raise any of these errors.
_LOADING_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def load_reward_model(place: Path | str, *, device: torch.device, dtype: Dtype) -> tuple[Any, Any]:
    """Return a reward model, in evaluation mode, and its tokenizer.

    Args:
        place: the folder or hub id of a sequence classifier, or the folder of an adapter that
            `train_reward_model` wrote. The adapter is merged into its base, which its record names.
        device: the model's device.
        dtype: the model's dtype; `auto` takes the dtype of its files.

    Raises:
        InputError: if the model cannot be loaded, or its files lack tensors.
        FileFormatError: if the model does not have exactly one output, or an adapter's file is damaged.
    """
    if (Path(place) / CONFIG_FILE).is_file():
        return _load_adapter(Path(place), device, dtype)
    model, missing = _load(place, dtype)
    # transformers fills missing tensors with random numbers: the output layer, if the model is a language model
    if missing:
        raise InputError(
            f"the model's files lack {len(missing)} of its tensors, such as {min(missing)}",
            where=str(place),
            mend="give a model that was trained as a reward model; a language model has no output layer for rewards",
        )
    if model.config.num_labels != 1:
        raise FileFormatError(
            f"the model has {model.config.num_labels} outputs, but a reward model has one",
            where=str(place),
            mend="give a model that was trained with num_labels=1",
        )
    return model.to(device).eval(), load_classifier_tokenizer(place)


def load_untrained_reward_model(base: Path | str, *, dtype: Dtype, seed: int) -> Any:
    """Return a language model with a new output layer for rewards, which `seed` draws, on the CPU.

    Raises:
        InputError: if the base cannot be loaded, or its files lack tensors other than the output layer's.
    """
    torch.manual_seed(seed)
    model, missing = _load(place_of(base), dtype, num_labels=1)
    lost = sorted(name for name in missing if name.startswith(f"{model.base_model_prefix}."))
    if lost:
        raise InputError(
            f"the model's files lack {len(lost)} of its tensors; the first is {lost[0]}",
            where=str(base),
            mend="copy or download the model again",
        )
    return model


def reward_model_digest(place: Path | str) -> str:
    """Return the hex digest of a reward model's tensors.

    Raises:
        InputError: if a file cannot be read.
    """
    if not (Path(place) / CONFIG_FILE).is_file():
        return base_fingerprint(place)
    record = read_expert_record(Path(place))
    base = None if record is None else record.base.fingerprint
    return str(blake3(f"{base} {digest_file(Path(place) / WEIGHTS_FILE)}".encode()).hexdigest())


def load_classifier_tokenizer(place: Path | str) -> Any:
    """Return the tokenizer of a classifier. Other than that of a base, it needs no end token: encoders have none.

    Raises:
        InputError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    found = find_base(place)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(place), **found)
    except _LOADING_FAULTS as error:
        raise _not_loaded(place, error) from error


def _load_adapter(folder: Path, device: torch.device, dtype: Dtype) -> tuple[Any, Any]:
    from peft import PeftModel

    record = read_expert_record(folder)
    if record is None or record.method != "reward" or record.base.name is None:
        raise InputError(
            "the adapter is not a reward model",
            where=str(folder),
            mend="give a folder that train_reward_model or psoups train wrote, or a whole sequence classifier",
        )
    base = record.base.name
    SafetensorsFile.open(folder / WEIGHTS_FILE)  # a damaged file has a clear error
    model = load_untrained_reward_model(base, dtype=dtype, seed=0)  # the adapter holds the output layer, too
    try:
        with quiet_transformers():
            merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except _LOADING_FAULTS as error:
        raise _not_loaded(folder, error) from error
    return merged.to(device).eval(), load_classifier_tokenizer(place_of(base))


def _load(place: Path | str, dtype: Dtype, **options: Any) -> tuple[Any, set[str]]:
    """Return a sequence classifier, and the names of the tensors that its files lack."""
    from transformers import AutoModelForSequenceClassification

    found = find_base(place)
    chosen = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                str(place), dtype=chosen, use_safetensors=True, output_loading_info=True, **options, **found
            )
    except _LOADING_FAULTS as error:
        raise _not_loaded(place, error) from error
    model, info = loaded
    return model, set(info["missing_keys"])


def _not_loaded(place: Path | str, error: Exception) -> InputError:
    return InputError(
        f"the reward model cannot be loaded: {first_line(error)}",
        where=str(place),
        mend="give the folder or hub id of a sequence-classification model, with safetensors files",
    )
