"""Write the model of a GGUF file as a model folder: config.json, safetensors and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from personalized_soups.bases.architectures import model_config
from personalized_soups.bases.gguf_header import GgufHeader
from personalized_soups.bases.gguf_tensors import GgufTensors, Progress, dtype_of
from personalized_soups.bases.gguf_tokenizer import end_ids, open_tokenizer
from personalized_soups.errors import check_extra
from personalized_soups.files.file_names import MODEL_WEIGHTS_FILE
from personalized_soups.files.header import TORCH_DTYPES


def write_model(path: Path, folder: Path, on_progress: Progress | None = None) -> str:
    """Write the model of a GGUF file into an empty folder, and return the dtype of its tensors, such as `BF16`.

    Args:
        path: the GGUF file.
        folder: the empty folder.
        on_progress: receives the number of bytes of tensors that are written, and of all bytes.

    Raises:
        FileFormatError: if the file is not a GGUF file, is truncated, or is not the file of one whole model.
        InputError: if the architecture, a type of quantization or the tokenizer is not supported.
        UsageError: if the package gguf is not installed.
    """
    check_extra("smollm2", "gguf")
    header = GgufHeader.read(path)
    config = model_config(header)
    model = _empty_model(config)
    config.architectures = [type(model).__name__]
    # a tied output layer is the input embedding, so it is not listed
    tensors = GgufTensors(header, {name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
    tokenizer = open_tokenizer(header)
    dtype = dtype_of(header)
    tensors.write(folder / MODEL_WEIGHTS_FILE, dtype, on_progress)
    _write_configs(header, config, tokenizer, dtype, folder)
    tokenizer.save_pretrained(str(folder))
    return dtype


def _empty_model(config: Any) -> Any:
    """Return the model of a configuration without the memory of its tensors, which have only shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _write_configs(header: GgufHeader, config: Any, tokenizer: Any, dtype: str, folder: Path) -> None:
    from transformers import GenerationConfig

    ends = end_ids(header, tokenizer)
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = ends[0]
    config.dtype = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    config.save_pretrained(str(folder))
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(str(folder))
