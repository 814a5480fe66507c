"""A LoRA adapter folder: its configuration, and its tensors in safetensors files.

Shapes: R = rank, I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from personalized_soups.adapters.config import AdapterConfig
from personalized_soups.adapters.modules import Header, LoraModule, modules_of
from personalized_soups.adapters.names import parse_name
from personalized_soups.adapters.trained import TrainedTensor, trained_of
from personalized_soups.errors import InputError, choose_from
from personalized_soups.files.file_names import CONFIG_FILE, INDEX_SUFFIX, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE
from personalized_soups.files.header import TensorEntry
from personalized_soups.files.pickles import check_no_pickle
from personalized_soups.files.shards import Checkpoint
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.finite import all_finite


@dataclass(frozen=True, eq=False, slots=True)
class LoraAdapter:
    """A folder with `adapter_config.json` and `adapter_model.safetensors`, or shards with an index.

    A tensor is read only when a method returns it.

    Attributes:
        folder: the folder.
        config: the configuration.
        modules: the modules and parameters that have LoRA factors, by name.
        trained: the tensors that were trained as a whole, by their names in the file.
    """

    folder: Path
    config: AdapterConfig
    modules: Mapping[str, LoraModule]
    trained: Mapping[str, TrainedTensor]
    _weights: Checkpoint

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open an adapter folder.

        Only the configuration and the headers of the weight files are read. All tensors must have known names, and
        shapes that fit the configuration.

        Raises:
            FileFormatError: if a file is damaged, or if factors are missing or have other shapes than configured.
            UnsupportedAdapterError: if this version cannot merge the adapter. The error names the variant of LoRA or
                the tensor.
            InputError: if the folder or a file is missing.
        """
        folder = Path(folder)
        config = AdapterConfig.open(folder)
        weights, where = _weights_of(folder)
        entries = {name: weights.entry(name) for name in weights}
        header = Header(where, entries, {name: parse_name(name, where=where) for name in entries}, config)
        if not entries:
            raise header.fault("the file has no tensors")
        modules = modules_of(header)
        trained = trained_of(header, modules)
        return cls(folder, config, MappingProxyType(modules), MappingProxyType(trained), weights)

    def factors(self, module: str, dtype: torch.dtype = torch.float32) -> Factors:
        """Return a module's factors A [R, I] and B [O, R] on the CPU, converted to `dtype`.

        The factors may share memory with the mapped file. The kernel of a convolution is flattened into A's columns. If
        a module has several blocks, their factors are interleaved, as PEFT saves them; `placement.blocks_of` separates
        them.

        Raises:
            InputError: if the adapter has no such module, or if a value is NaN or infinite in `dtype`. The error names
                the file and the tensor.
        """
        description = self._module(module)
        a_RI = self._finite(description.a_name, dtype).flatten(1)
        b_OR = self._finite(description.b_name, dtype).flatten(1)
        return Factors(a_RI, b_OR, description.scaling)

    def trained_tensor(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Return a tensor that was trained as a whole, on the CPU, with the shape that `trained[name]` gives.

        The tensor may share memory with the mapped file.

        Args:
            name: the tensor's name in the file.
            dtype: the dtype to convert the tensor to; None keeps the dtype of the file.

        Raises:
            InputError: if the adapter has no such tensor, or if a value is NaN or infinite in `dtype`. The error names
                the file and the tensor.
        """
        if name not in self.trained:
            raise InputError(
                f"the adapter has no trained tensor {name!r}",
                where=str(self.folder),
                mend=choose_from(name, self.trained),
            )
        return self._finite(name, dtype).reshape(self.trained[name].shape)

    def a_bytes(self, module: str) -> tuple[TensorEntry, memoryview]:
        """Return the header's entry of a module's A, and its bytes in the file. The bytes are not copied."""
        return self._bytes(self._module(module).a_name)

    def b_bytes(self, module: str) -> tuple[TensorEntry, memoryview]:
        """Return the header's entry of a module's B, and its bytes in the file. The bytes are not copied."""
        return self._bytes(self._module(module).b_name)

    @property
    def dtypes(self) -> frozenset[str]:
        """The dtypes of the tensors, as the safetensors format names them (`BF16`)."""
        names = [name for module in self.modules.values() for name in (module.a_name, module.b_name)]
        return frozenset(self._weights.entry(name).dtype for name in [*names, *self.trained])

    @property
    def files(self) -> tuple[Path, ...]:
        """The configuration and the weight files, which a merge reads."""
        return (self.config.path, *(shard.path for shard in self._weights.shards.values()))

    @property
    def num_bytes(self) -> int:
        """The total size of the weight files in bytes."""
        return self._weights.num_bytes

    def _bytes(self, name: str) -> tuple[TensorEntry, memoryview]:
        return self._weights.entry(name), self._weights.raw(name)

    def _module(self, name: str) -> LoraModule:
        try:
            return self.modules[name]
        except KeyError:
            raise InputError(
                f"the adapter has no module {name!r}", where=str(self.folder), mend=choose_from(name, self.modules)
            ) from None

    def _finite(self, name: str, dtype: torch.dtype | None) -> Tensor:
        stored = self._weights.tensor(name)
        tensor = stored if dtype is None else stored.to(dtype)
        if not all_finite(tensor):
            index = [int(i) for i in (~torch.isfinite(tensor)).nonzero()[0]]
            raise InputError(
                f"{name}: the value at {index} is {tensor[tuple(index)].item()}",
                where=str(self._weights.shard_of(name).path),
                mend="train the expert again or remove it: its training diverged, or its file is damaged",
            )
        return tensor


def _weights_of(folder: Path) -> tuple[Checkpoint, str]:
    """Return the weight files of an adapter, and the path that errors name."""
    index = folder / f"{WEIGHTS_FILE}{INDEX_SUFFIX}"
    for path in (index, folder / WEIGHTS_FILE):
        if path.is_file():
            return Checkpoint.open(folder, weights_file=WEIGHTS_FILE), str(path)
    check = folder / PICKLED_WEIGHTS_FILE
    if check.is_file():
        check_no_pickle(check)
    raise InputError(
        f"the folder has {CONFIG_FILE} but no {WEIGHTS_FILE}",
        where=str(folder),
        mend="save or download the adapter again, because it is incomplete",
    )
