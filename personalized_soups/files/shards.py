"""A checkpoint: one safetensors file, or several files (shards) and an index that names the file of each tensor."""

from __future__ import annotations

import os
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from personalized_soups.errors import FileFormatError, InputError, choose_from
from personalized_soups.files.file_names import INDEX_SUFFIX, MODEL_INDEX_FILE, MODEL_WEIGHTS_FILE
from personalized_soups.files.header import TensorEntry
from personalized_soups.files.pickles import PICKLES, check_no_pickle
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.regular import read_small
from personalized_soups.files.strict_json import parse_json, shown

_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True, eq=False, slots=True)
class Checkpoint:
    """The weight files of one folder, opened and with checked headers.

    Attributes:
        folder: the folder.
        shards: the opened files by file name, sorted by name.
        has_index: whether the files were listed by an index.
    """

    folder: Path
    shards: Mapping[str, SafetensorsFile]
    has_index: bool
    _shard_of: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path | str, *, weights_file: str = MODEL_WEIGHTS_FILE) -> Self:
        """Open the weight files of `folder` by the rules of transformers.

        If the file `weights_file` exists, an index that lists other files is ignored with a warning. Otherwise the
        index decides which files are read. The tensors are always those that the files contain. If the index does not
        match them, a warning lists the differences.

        Args:
            folder: the folder that contains the files.
            weights_file: the name of the file that contains all weights if there is no index.

        Raises:
            FileFormatError: if there is no safetensors file, if a file or the index is damaged, if a shard is missing,
                or if two shards have the same tensor.
        """
        folder = Path(folder)
        index = folder / f"{weights_file}{INDEX_SUFFIX}"
        names = _index_of(folder, weights_file)
        files = {weights_file} if names is None else set(names.values())
        shards = {file: SafetensorsFile.open(folder / file) for file in sorted(files)}
        shard_of: dict[str, str] = {}
        for file, shard in shards.items():
            for name in shard.entries:
                if name in shard_of:
                    raise _fault(index, f"tensor {shown(name)} is in both {shard_of[name]} and {file}")
                shard_of[name] = file
        if names is not None and names != shard_of:
            warnings.warn(_differences(index, names, shard_of), RuntimeWarning, stacklevel=2)
        return cls(folder, MappingProxyType(shards), names is not None, MappingProxyType(shard_of))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all tensors."""
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of one tensor in the header of its file."""
        return self.shard_of(name).entry(name)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor on the CPU. See `SafetensorsFile.tensor`."""
        return self.shard_of(name).tensor(name)

    def raw(self, name: str) -> memoryview:
        """Return the stored bytes of one tensor, without a copy."""
        return self.shard_of(name).raw(name)

    @property
    def num_bytes(self) -> int:
        """The total size of all weight files in bytes."""
        return sum(shard.num_bytes for shard in self.shards.values())

    def shard_of(self, name: str) -> SafetensorsFile:
        """Return the file that contains the tensor `name`.

        Raises:
            FileFormatError: if no file contains the tensor.
        """
        try:
            return self.shards[self._shard_of[name]]
        except KeyError:
            raise FileFormatError(
                f"the checkpoint has no tensor {name!r}", where=str(self.folder), mend=choose_from(name, self)
            ) from None


def _index_of(folder: Path, whole: str) -> dict[str, str] | None:
    """Return the file name of each tensor if the index is to be used, or None if the file `whole` is to be used."""
    index = folder / f"{whole}{INDEX_SUFFIX}"
    if not os.path.lexists(index):
        if not os.path.lexists(folder / whole):
            raise _no_weights(folder)
        return None
    if not (folder / whole).is_file():
        return _indexed(index)
    # Both exist. transformers then reads the file `whole` and ignores the index, so a damaged index is not an error.
    try:
        names = _indexed(index)
    except (FileFormatError, InputError):
        names = {}
    if set(names.values()) == {whole}:
        return names
    warnings.warn(
        f"{folder} has both {whole} and {index.name}, and the index names other files. As in transformers, {whole} is "
        "read and the index is ignored. Remove whichever of the two is outdated.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _indexed(index: Path) -> dict[str, str]:
    """Read and check an index, and return the file name of each tensor."""
    parsed = parse_json(read_small(index, _MAX_INDEX_BYTES), index)
    names = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(names, dict) or not names:
        raise _fault(index, "the index has no weight_map, which names the file of each tensor")
    plain: dict[Any, str] = {}
    for name, file in names.items():
        if isinstance(file, str) and file in plain:
            continue
        # A path with a folder could lead to any file on the disk.
        shard = file.removeprefix("./") if isinstance(file, str) else ""
        if not _is_plain(shard):
            raise _fault(
                index,
                f"the index places tensor {shown(name)} in {reprlib.repr(file)}, which is not a plain file name",
            )
        check_no_pickle(index.with_name(shard))
        if not os.path.lexists(index.with_name(shard)):
            raise _fault(index, f"the shard {shown(shard)} is missing, but the index places tensor {shown(name)} in it")
        plain[file] = shard
    return {name: plain[file] for name, file in names.items()}


def _differences(index: Path, names: Mapping[str, str], shard_of: Mapping[str, str]) -> str:
    """Return a warning that lists where the index differs from the tensors in the shards."""
    kinds = {
        "names {}, which no shard has": sorted(names.keys() - shard_of.keys()),
        "does not name {}, which a shard has": sorted(shard_of.keys() - names.keys()),
        "names the wrong shard for {}": sorted(
            name for name in names.keys() & shard_of.keys() if names[name] != shard_of[name]
        ),
    }
    differences = [kind.format(_some(differing)) for kind, differing in kinds.items() if differing]
    return f"{index}: the index {', and '.join(differences)}. The tensors in the shards are read."


def _some(names: Sequence[str]) -> str:
    return shown(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _is_plain(file: str) -> bool:
    return Path(file).name == file and file not in {"", ".."} and not set(file) & {"\\", "\0"}


def _no_weights(folder: Path) -> FileFormatError:
    if not folder.is_dir():
        return FileFormatError("the folder does not exist", where=str(folder), mend="check the path of the model")
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES and path.name.startswith(("pytorch_model", "model")):
            check_no_pickle(path)
    return FileFormatError(
        f"the folder has neither {MODEL_WEIGHTS_FILE} nor {MODEL_INDEX_FILE}",
        where=str(folder),
        mend="give a model folder written by save_pretrained with safetensors",
    )


def _fault(path: Path, what: str) -> FileFormatError:
    return FileFormatError(what, where=str(path), mend="download the checkpoint again: it is damaged or incomplete")
