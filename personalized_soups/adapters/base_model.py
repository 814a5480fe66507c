"""A base model: its folder, its checkpoint and the names of its tensors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from personalized_soups.adapters.compatible import strangers
from personalized_soups.adapters.embeddings import Embeddings
from personalized_soups.adapters.fingerprint import base_fingerprint, base_folder
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.renaming import renamings
from personalized_soups.adapters.stored_names import StoredNames
from personalized_soups.bases.place import place_of
from personalized_soups.errors import InputError, UnsupportedAdapterError
from personalized_soups.files.atomic import MARKERS, files_below
from personalized_soups.files.file_names import INDEX_SUFFIX, MODEL_CONFIG_FILE, MODEL_INDEX_FILE
from personalized_soups.files.pickles import PICKLES
from personalized_soups.files.regular import check_no_lfs_pointers
from personalized_soups.files.shards import Checkpoint
from personalized_soups.files.strict_json import parse_json

# Suffixes of weight files. These files are not copied into a merged model's folder, because their weights are unmerged.
_OTHER_WEIGHTS = PICKLES | {".safetensors", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".tflite", ".ot"}


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model in a folder. Its weight files are opened and checked, but no tensor is read.

    Attributes:
        name: the hub id, or the folder's absolute path.
        folder: the folder.
        config: the contents of config.json.
        checkpoint: the weight files.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint

    @classmethod
    def open(cls, base: Path | str) -> Self:
        """Open a base model.

        Args:
            base: the name of a named base, a model folder, a GGUF file, or the hub id of a model in the local cache.

        Raises:
            InputError: if the model does not exist or has no config.json.
            FileFormatError: if a weight file is damaged or is a pickle, or if a file is a Git LFS pointer.
            UnsupportedAdapterError: if the model is quantised.
        """
        base = place_of(base)
        folder = base_folder(base)
        config = _model_config(folder)
        check_no_lfs_pointers(folder)
        if quantization := config.get("quantization_config"):
            kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UnsupportedAdapterError(
                f"the base is quantised ({kind}), but this version cannot merge into quantised tensors",
                where=str(folder),
                mend="give the unquantised base, or merge plain LoRA experts without a base",
            )
        # the absolute path, because records of the base must be valid in any working directory
        name = str(folder.resolve()) if Path(base) == folder else str(base)
        return cls(name, folder, config, Checkpoint.open(folder))

    @cached_property
    def fingerprint(self) -> str:
        """The base's fingerprint; see `base_fingerprint`."""
        return base_fingerprint(self.folder)

    @cached_property
    def _embeddings(self) -> Embeddings:
        return Embeddings(self.config, self.checkpoint)

    @property
    def tied(self) -> tuple[str, str] | None:
        """The names of the input and the output embedding if they are tied, else None; see `Embeddings.tied`."""
        return self._embeddings.tied

    @property
    def output_for_both(self) -> str | None:
        """The name of the output embedding if it is tied and the files have no input embedding, else None."""
        return self._embeddings.output_for_both

    @cached_property
    def names(self) -> StoredNames:
        """The names of the tensors in the files, with a search for a tensor of the model in memory."""
        model_type = self.config.get("model_type")
        return StoredNames(
            self.checkpoint,
            model_type if isinstance(model_type, str) else None,
            lambda: renamings(self.folder, self.config, self.checkpoint),
        )

    def find(self, tensor: str) -> str | None:
        """Return the checkpoint's name for a tensor of the model in memory, or None if there is none."""
        return None if self._embeddings.is_missing_output(tensor) else self.names.find(tensor)

    def source(self, tensor: str) -> str | None:
        """Return the checkpoint's name for the values of a tensor, or None if the checkpoint does not have them.

        The values of a tied output embedding have the input embedding's name.
        """
        if self.tied is not None and self._embeddings.is_missing_output(tensor):
            return self.tied[0]
        return self.find(tensor)

    def written_name(self, tensor: str) -> str:
        """Return the name that a tensor of the model in memory has in the files of a merged model."""
        if self.tied is not None and self._embeddings.is_missing_output(tensor):
            return self.tied[1]
        return self.find(tensor) or tensor

    def check_fingerprints(self, experts: list[Expert]) -> None:
        """Raise if an expert was trained on a base with another fingerprint.

        Raises:
            IncompatibleExpertsError: if there are such experts. The error names all of them.
        """
        for fault in strangers(experts, self.fingerprint, self.name):
            raise fault

    def other_files(self) -> list[str]:
        """Return the paths of all files without weights, relative to the folder.

        Hidden files and folders (`.git`, `.cache`) are skipped. This package's records (soup.json) are skipped as well,
        because they describe the base and not the merged model.
        """
        others = []
        for name in sorted(files_below(self.folder)):
            relative = Path(name)
            is_weights = relative.suffix.lower() in _OTHER_WEIGHTS or (
                relative.name.endswith(INDEX_SUFFIX) and (name != MODEL_INDEX_FILE or not self.checkpoint.has_index)
            )
            is_hidden = any(part.startswith(".") for part in relative.parts)
            if not (is_weights or is_hidden or name in MARKERS) and (self.folder / relative).is_file():
                others.append(name)
        return others


def copy_others(base: BaseModel, folder: Path) -> None:
    """Copy all files of the base that are not weights into `folder`."""
    for name in base.other_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / name, folder / name)


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_CONFIG_FILE
    try:
        config = parse_json(path.read_bytes(), path, constants=True)
    except FileNotFoundError:
        raise InputError(
            f"the folder is not a model folder: it has no {MODEL_CONFIG_FILE}",
            where=str(folder),
            mend="give a folder written by save_pretrained",
        ) from None
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check its permissions"
        ) from error
    return config if isinstance(config, dict) else {}
