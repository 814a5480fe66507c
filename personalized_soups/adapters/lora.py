"""One LoRA adapter folder: its configuration and its factors, read straight from the safetensors file.

R rank, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from personalized_soups.adapters.config import CONFIG_FILE, AdapterConfig
from personalized_soups.adapters.names import a_name, b_name, split_name
from personalized_soups.errors import FileFormatError, InputError, UnsupportedAdapterError, choose_from
from personalized_soups.files.reader import SafetensorsFile, TensorEntry, check_no_pickle
from personalized_soups.methods.factors import Factors

WEIGHTS_FILE = "adapter_model.safetensors"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One linear layer that an adapter changes, as headers and configuration describe it."""

    name: str
    rank: int
    in_features: int
    out_features: int
    scaling: float


@dataclass(frozen=True, eq=False, slots=True)
class LoraAdapter:
    """A folder with `adapter_config.json` and `adapter_model.safetensors`; opened, not read."""

    folder: Path
    config: AdapterConfig
    modules: Mapping[str, LoraModule]
    _file: SafetensorsFile

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read the configuration and the header; check that they agree and that every A has its B.

        Raises:
            FileFormatError: if a file is damaged, or the factors are incomplete or of other shapes than configured.
            UnsupportedAdapterError: if the adapter is no plain LoRA on linear layers.
            InputError: if the folder or a file is missing.
        """
        folder = Path(folder)
        config = AdapterConfig.open(folder)
        file = SafetensorsFile.open(_weights_of(folder))
        modules = _modules(file, config)
        return cls(folder, config, MappingProxyType(modules), file)

    def factors(self, module: str, dtype: torch.dtype = torch.float32) -> Factors:
        """Return a module's factors on the CPU, converted to `dtype`; they may share the file's pages.

        Raises:
            InputError: naming file and tensor where a value is NaN or infinite (in `dtype`), or the module is unknown.
        """
        try:
            scaling = self.modules[module].scaling
        except KeyError:
            raise InputError(
                f"the adapter has no module {module!r}",
                where=str(self.folder),
                mend=choose_from(module, self.modules),
            ) from None
        return Factors(self._finite(a_name(module), dtype), self._finite(b_name(module), dtype), scaling)

    def a_bytes(self, module: str) -> tuple[TensorEntry, memoryview]:
        """Return a module's A as it stands in the file: its entry and its bytes, without a copy."""
        name = a_name(module)
        return self._file.entry(name), self._file.raw(name)

    @property
    def dtypes(self) -> frozenset[str]:
        """The dtypes of the factors, in the format's own names."""
        return frozenset(entry.dtype for entry in self._file.entries.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that a merge reads."""
        return (self.config.path, self._file.path)

    @property
    def num_bytes(self) -> int:
        """Size of the weight file."""
        return self._file.num_bytes

    def _finite(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._file.tensor(name).to(dtype)
        if not bool(torch.isfinite(tensor).all()):
            index = [int(i) for i in (~torch.isfinite(tensor)).nonzero()[0]]
            raise InputError(
                f"{name}: the value at {index} is {tensor[tuple(index)].item()}",
                where=str(self._file.path),
                mend="this expert's training diverged or its file is damaged: train it again, or leave it out",
            )
        return tensor


def _weights_of(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    check = folder / "adapter_model.bin"
    if check.is_file():
        check_no_pickle(check)
    if (folder / f"{WEIGHTS_FILE}.index.json").is_file():
        raise UnsupportedAdapterError(
            "the adapter is sharded, which this version does not merge",
            where=str(folder),
            mend="save it in one file: save_pretrained(..., max_shard_size='100GB')",
        )
    raise InputError(
        f"the folder has {CONFIG_FILE} but no {WEIGHTS_FILE}",
        where=str(folder),
        mend="the adapter is incomplete: save or download it again",
    )


def _modules(file: SafetensorsFile, config: AdapterConfig) -> dict[str, LoraModule]:
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for entry in file.entries.values():
        module, factor = split_name(entry.name, where=str(file.path))
        pairs.setdefault(module, {})[factor] = entry
    if not pairs:
        raise _fault(file, "the file holds no tensors")
    return {module: _module(file, config, module, pairs[module]) for module in sorted(pairs)}


def _module(file: SafetensorsFile, config: AdapterConfig, module: str, pair: Mapping[str, TensorEntry]) -> LoraModule:
    for factor, name in (("A", a_name(module)), ("B", b_name(module))):
        if factor not in pair:
            raise _fault(file, f"{module}: {name} is missing")
        entry = pair[factor]
        if entry.dtype not in _FLOATS:
            raise UnsupportedAdapterError(
                f"{name}: its dtype is {entry.dtype}, this version reads {', '.join(sorted(_FLOATS))}",
                where=str(file.path),
                mend="save the adapter in float32, float16 or bfloat16",
            )
        if len(entry.shape) != 2:
            raise UnsupportedAdapterError(
                f"{name}: its shape is {list(entry.shape)}: a LoRA on a layer that is not linear",
                where=str(file.path),
                mend="train the expert on linear layers alone",
            )
    rank, in_features = pair["A"].shape
    out_features, rank_of_b = pair["B"].shape
    expected = config.rank_of(module)
    if rank != rank_of_b or rank != expected:
        raise _fault(file, f"{module}: A has rank {rank}, B has rank {rank_of_b}, {CONFIG_FILE} says {expected}")
    if in_features == 0 or out_features == 0:
        raise _fault(file, f"{module}: its factors are empty, {list(pair['B'].shape)} and {list(pair['A'].shape)}")
    return LoraModule(module, rank, in_features, out_features, config.scaling_of(module))


def _fault(file: SafetensorsFile, what: str) -> FileFormatError:
    return FileFormatError(what, where=str(file.path), mend="save the adapter again with PEFT's save_pretrained")
