"""A checkpoint: one safetensors file, or several with an index that maps tensor names to files."""

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
from personalized_soups.files.reader import PICKLES, SafetensorsFile, TensorEntry, check_no_pickle, parse_json, shown
from personalized_soups.files.regular import read_small

_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True, eq=False, slots=True)
class Checkpoint:
    """The weight files of one model folder, opened and checked; `shards` stand in the order of their names."""

    folder: Path
    shards: Mapping[str, SafetensorsFile]
    has_index: bool
    _shard_of: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path | str, *, weights_file: str = MODEL_WEIGHTS_FILE) -> Self:
        """Open every weight file of `folder`, by the rules of transformers.

        A whole file takes precedence over an index of other files. The index says which files there are, and these say
        which tensors they hold: where the index names others, a warning says so.

        Args:
            folder: where the files are.
            weights_file: the name of the file that holds all weights if there is no index.

        Raises:
            FileFormatError: if there is no safetensors file, a shard is missing or damaged, or a tensor is in two.
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
                    raise _fault(index, f"{shown(name)}: it is in {shard_of[name]} and in {file}")
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
        """Return where one tensor stands in its shard."""
        return self.shard_of(name).entry(name)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, as SafetensorsFile.tensor does."""
        return self.shard_of(name).tensor(name)

    def raw(self, name: str) -> memoryview:
        """Return one tensor's bytes, without a copy."""
        return self.shard_of(name).raw(name)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files together."""
        return sum(shard.num_bytes for shard in self.shards.values())

    def shard_of(self, name: str) -> SafetensorsFile:
        """Return the file that one tensor stands in.

        Raises:
            FileFormatError: if there is no such tensor.
        """
        try:
            return self.shards[self._shard_of[name]]
        except KeyError:
            raise FileFormatError(
                f"the checkpoint has no tensor {name!r}", where=str(self.folder), mend=choose_from(name, self)
            ) from None


def _index_of(folder: Path, whole: str) -> dict[str, str] | None:
    """Return the index of a folder's weight files, or None where a whole file is to be read."""
    index = folder / f"{whole}{INDEX_SUFFIX}"
    if not os.path.lexists(index):
        if not os.path.lexists(folder / whole):
            raise _no_weights(folder)
        return None
    if not (folder / whole).is_file():
        return _indexed(index)
    # transformers reads the whole file and does not open the index
    try:
        names = _indexed(index)
    except (FileFormatError, InputError):
        names = {}
    if set(names.values()) == {whole}:
        return names
    warnings.warn(
        f"{folder} has {whole} and {index.name}, which names other files: {whole} is read, as by transformers, and the "
        "index is not. Remove the one that is out of date.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _indexed(index: Path) -> dict[str, str]:
    """Return the file of each tensor, by an index."""
    parsed = parse_json(read_small(index, _MAX_INDEX_BYTES), index)
    names = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(names, dict) or not names:
        raise _fault(index, "the index has no weight_map")
    plain: dict[Any, str] = {}
    for name, file in names.items():
        if isinstance(file, str) and file in plain:
            continue
        # a name with a folder in it could point anywhere on the disk
        beside = file.removeprefix("./") if isinstance(file, str) else ""
        if not _is_plain(beside):
            raise _fault(index, f"{shown(name)}: the index names {reprlib.repr(file)}, not a file beside it")
        check_no_pickle(index.with_name(beside))
        if not os.path.lexists(index.with_name(beside)):
            raise _fault(index, f"the shard {shown(beside)} is missing; {shown(name)} should be in it")
        plain[file] = beside
    return {name: plain[file] for name, file in names.items()}


def _differences(index: Path, names: Mapping[str, str], shard_of: Mapping[str, str]) -> str:
    """Return the warning about an index that does not name what the shards hold."""
    kinds = {
        "names {}, which no shard holds": sorted(names.keys() - shard_of.keys()),
        "does not name {}, which a shard holds": sorted(shard_of.keys() - names.keys()),
        "names another shard for {} than the one that holds it": sorted(
            name for name in names.keys() & shard_of.keys() if names[name] != shard_of[name]
        ),
    }
    found = [kind.format(_some(differing)) for kind, differing in kinds.items() if differing]
    return f"{index}: the index {', and '.join(found)}. What the shards hold is read."


def _some(names: Sequence[str]) -> str:
    return shown(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _is_plain(file: str) -> bool:
    return Path(file).name == file and file not in {"", ".."} and not set(file) & {"\\", "\0"}


def _no_weights(folder: Path) -> FileFormatError:
    if not folder.is_dir():
        return FileFormatError("there is no such folder", where=str(folder), mend="check the path of the model")
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES and path.name.startswith(("pytorch_model", "model")):
            check_no_pickle(path)
    return FileFormatError(
        f"the folder has neither {MODEL_WEIGHTS_FILE} nor {MODEL_INDEX_FILE}",
        where=str(folder),
        mend="give a model folder that save_pretrained wrote with safetensors",
    )


def _fault(path: Path, what: str) -> FileFormatError:
    return FileFormatError(what, where=str(path), mend="the checkpoint is damaged or incomplete: download it again")
