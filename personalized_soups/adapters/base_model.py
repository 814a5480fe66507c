"""The base model that a soup is folded into: its folder, its checkpoint, and which of its tensors are one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from personalized_soups.adapters.compatible import strangers
from personalized_soups.adapters.fingerprint import base_fingerprint, base_folder
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.names import core_name
from personalized_soups.adapters.renaming import renamings
from personalized_soups.adapters.stored_names import StoredNames
from personalized_soups.adapters.tie_flag import says_tied
from personalized_soups.errors import InputError, UnsupportedAdapterError
from personalized_soups.files.atomic import MARKERS, files_below
from personalized_soups.files.file_names import INDEX_SUFFIX, MODEL_CONFIG_FILE, MODEL_INDEX_FILE
from personalized_soups.files.pickles import PICKLES
from personalized_soups.files.regular import check_no_lfs_pointers
from personalized_soups.files.shards import Checkpoint
from personalized_soups.files.strict_json import parse_json

# Weights in other forms would stay those of the base alone: they are left out of the new folder.
_OTHER_WEIGHTS = PICKLES | {".safetensors", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".tflite", ".ot"}

# The modules that transformers ties: a causal model's input and output embeddings.
_INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_OUTPUTS = ("lm_head", "embed_out", "output")


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A model folder with its weight files opened and checked, not read."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint

    @classmethod
    def open(cls, base: Path | str) -> Self:
        """Open a folder, or a hub id that stands in the local cache.

        Raises:
            InputError: if it is not there or has no config.json.
            FileFormatError: if its weight files are damaged or pickles, or a file is a Git LFS pointer.
            UnsupportedAdapterError: if it is quantised.
        """
        folder = base_folder(base)
        config = _model_config(folder)
        check_no_lfs_pointers(folder)
        if quantization := config.get("quantization_config"):
            kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UnsupportedAdapterError(
                f"the base is quantised ({kind}), which this version does not merge with",
                where=str(folder),
                mend="give the base as it was before it was quantised; an adapter of plain LoRA needs no base",
            )
        # a path is told whole, so that it leads to the same folder from anywhere
        name = str(folder.resolve()) if Path(base) == folder else str(base)
        return cls(name, folder, config, Checkpoint.open(folder))

    @cached_property
    def fingerprint(self) -> str:
        """What the experts' records know it by."""
        return base_fingerprint(self.folder)

    @cached_property
    def tied(self) -> tuple[str, str] | None:
        """The names of the input and the output embedding where they are one tensor, which stands under the first."""
        inputs, outputs = self._embeddings
        if len(inputs) != 1 or not self._says_tied:
            return None
        # files of another shape than the embedding's are not loaded as one tensor, whatever the configuration says
        same = [name for name in outputs if self._shape(name) == self._shape(inputs[0])]
        if outputs and not same:
            return None
        return inputs[0], same[0] if same else f"{_head_of(inputs[0])}.weight"

    @cached_property
    def output_for_both(self) -> str | None:
        """The name of the output embedding where transformers makes the input embedding, which is missing, of it."""
        inputs, outputs = self._embeddings
        return outputs[0] if not inputs and len(outputs) == 1 and self._says_tied else None

    @cached_property
    def names(self) -> StoredNames:
        """The names of the tensors in the files, and what finds a tensor of the model in memory among them."""
        model_type = self.config.get("model_type")
        return StoredNames(
            self.checkpoint,
            model_type if isinstance(model_type, str) else None,
            lambda: renamings(self.folder, self.config, self.checkpoint),
        )

    def find(self, tensor: str) -> str | None:
        """Return the name under which the checkpoint holds a tensor of the model in memory, or None."""
        return None if self._is_without_head(tensor) else self.names.find(tensor)

    def source(self, tensor: str) -> str | None:
        """Return the name under which the checkpoint holds what a tensor of the model is: another's where they are one.

        None where the checkpoint has neither.
        """
        if self.tied is not None and self._is_without_head(tensor):
            return self.tied[0]
        return self.find(tensor)

    def written_name(self, tensor: str) -> str:
        """Return the name under which a tensor of the model in memory is written."""
        if self.tied is not None and self._is_without_head(tensor):
            return self.tied[1]
        return self.find(tensor) or tensor

    def check_fingerprints(self, experts: list[Expert]) -> None:
        """Raise if an expert records the fingerprint of another base.

        Raises:
            IncompatibleExpertsError: naming every such expert.
        """
        for fault in strangers(experts, self.fingerprint, self.name):
            raise fault

    def other_files(self) -> list[str]:
        """Return every file that holds no weights, relative to the folder.

        Hidden files and folders (`.git`, `.cache`) are left out, and so is the base's own record: it tells of the base.
        """
        found = []
        for name in sorted(files_below(self.folder)):
            relative = Path(name)
            is_weights = relative.suffix.lower() in _OTHER_WEIGHTS or (
                relative.name.endswith(INDEX_SUFFIX) and (name != MODEL_INDEX_FILE or not self.checkpoint.has_index)
            )
            is_hidden = any(part.startswith(".") for part in relative.parts)
            if not (is_weights or is_hidden or name in MARKERS) and (self.folder / relative).is_file():
                found.append(name)
        return found

    def _is_without_head(self, tensor: str) -> bool:
        """Return whether a tensor is the output embedding of a tied model whose files have none."""
        is_head = core_name(tensor).removesuffix(".weight") in _OUTPUTS
        return is_head and self.tied is not None and self.tied[1] not in self.checkpoint

    @property
    def _is_causal(self) -> bool:
        return any("LM" in str(name) for name in self.config.get("architectures") or ())

    @property
    def _embeddings(self) -> tuple[list[str], list[str]]:
        inputs = [name for name in self.checkpoint if is_input_embedding(name) and len(self._shape(name)) == 2]
        return inputs, [name for name in self.checkpoint if _module(name) in _OUTPUTS]

    @cached_property
    def _says_tied(self) -> bool:
        says = says_tied(self.config)
        # where nothing says it, a causal model without a head of its own has the embedding for one
        return not self._embeddings[1] and self._is_causal if says is None else says

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.entry(name).shape


def copy_others(base: BaseModel, folder: Path) -> None:
    """Copy every file that holds no weights."""
    for name in base.other_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / name, folder / name)


def is_input_embedding(tensor: str) -> bool:
    """Return whether a tensor is a model's input embedding, by its name."""
    return _module(tensor) in _INPUTS


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[2]


def _head_of(embedding: str) -> str:
    return "embed_out" if _module(embedding) == "embed_in" else "lm_head"


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_CONFIG_FILE
    try:
        config = parse_json(path.read_bytes(), path, constants=True)
    except FileNotFoundError:
        raise InputError(
            "the folder has no config.json: it is no model folder",
            where=str(folder),
            mend="give a folder that save_pretrained wrote",
        ) from None
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check its permissions"
        ) from error
    return config if isinstance(config, dict) else {}
