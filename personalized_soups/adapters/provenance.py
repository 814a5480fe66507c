"""Where an expert or a soup comes from: the records `expert.json` and `soup.json` that stand beside the tensors."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from personalized_soups.declare.declared import Declared
from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.files.file_names import EXPERT_FILE, SOUP_FILE
from personalized_soups.files.strict_json import parse_json

# soup.json has a line per module; a model with a million adapted modules would still fit.
_MAX_RECORD_BYTES = 256 << 20


class BaseRecord(Declared):
    """Which base model: by the name that was given and by what its tensors hold."""

    name: str | None = Field(default=None, description="Path or hub id, as it was given.")
    fingerprint: str | None = Field(default=None, description="What base_fingerprint() said of it.")


class DataRecord(Declared):
    """The preference pairs that an expert was trained on."""

    name: str = Field(description="File name.")
    blake3: str = Field(description="BLAKE3 digest of the file, in hex.")
    num_pairs: int = Field(ge=0)


class ExpertRecord(Declared):
    """expert.json: what an expert is and how it came about."""

    format_version: Literal[1] = 1
    side: str = Field(min_length=1, description="The side of a preference dimension that it was trained for.")
    dimension: str | None = Field(default=None, description="That side's dimension.")
    base: BaseRecord = Field(default_factory=BaseRecord)
    recipe: dict[str, Any] = Field(default_factory=dict, description="Every hyper-parameter of its training.")
    basis: Literal["free", "shared"] = "free"
    data: DataRecord | None = None
    seed: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    files: tuple[str, ...] = Field(default=(), description="Every file of the folder that the training wrote.")


class InputRecord(Declared):
    """One expert that went into a soup."""

    name: str
    folder: str
    weight: float
    blake3: dict[str, str] = Field(description="BLAKE3 digest of each of its files that was read, in hex.")


class MethodRecord(Declared):
    """A merge method from outside this package: the function, and the digest of its source.

    Nothing imports the module because a record names it: the record may be anybody's.
    """

    module: str = Field(description="The module that defines the function.")
    function: str = Field(description="The function's qualified name.")
    blake3: str = Field(description="BLAKE3 digest of the module's source file, in hex.")


class TruncationRecord(Declared):
    """What the truncation lost: relative Frobenius errors of the delta."""

    rank: int = Field(description="The highest rank of a module.")
    energy: float | None = Field(default=None, description="The share of the energy that was asked for, if one was.")
    total: float = Field(ge=0)
    modules: dict[str, float] = Field(default_factory=dict)
    ranks: dict[str, int] = Field(default_factory=dict, description="Rank of each module that has another.")


class SoupRecord(Declared):
    """soup.json: what a merged adapter or model was made of, and how."""

    format_version: Literal[1] = 1
    kind: Literal["adapter", "model"]
    profile: dict[str, Any] = Field(description="The profile as it was declared.")
    method: str
    method_source: MethodRecord | None = Field(
        default=None, description="The function of a method from outside this package; left out for a built-in method."
    )
    options: dict[str, float] = Field(default_factory=dict, description="The method's options, all of them.")
    encoding: Literal["stacked", "truncated", "folded"]
    target: Literal["peft", "vllm"] = "peft"
    experts: tuple[InputRecord, ...]
    base: BaseRecord
    base_folder: str | None = Field(
        default=None, description="Of a merged adapter: the folder of the base, where it was read."
    )
    base_blake3: dict[str, str] = Field(
        default_factory=dict, description="BLAKE3 digest of each weight file of the base, where it was read."
    )
    untied: str | None = Field(
        default=None, description="The output embedding's tensor, where the base's two embeddings had to part."
    )
    rank: int | None = Field(default=None, description="The merged adapter's rank; none for a folded model.")
    dtype: str
    device: str
    truncation: TruncationRecord | None = None
    vllm_max_lora_rank: int | None = Field(
        default=None, description="The smallest --max-lora-rank with which vLLM loads the adapter."
    )
    versions: dict[str, str] = Field(default_factory=dict)
    files: tuple[str, ...] = Field(default=(), description="Every file of the folder that the merge wrote.")

    @model_serializer(mode="wrap")
    def _without_empty_source(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `method_source` out of the records of built-in methods: they were written before it existed."""
        table: dict[str, Any] = serialize(self)
        if table.get("method_source", self) is None:
            del table["method_source"]
        return table


Record = TypeVar("Record", bound=Declared)


def read_expert_record(folder: Path) -> ExpertRecord | None:
    """Return what `expert.json` in `folder` says, or None where there is none.

    Raises:
        FileFormatError: if the file is not JSON or not an expert record.
    """
    return _read(folder / EXPERT_FILE, ExpertRecord)


def read_soup_record(folder: Path) -> SoupRecord | None:
    """Return what `soup.json` in `folder` says, or None where there is none.

    Raises:
        FileFormatError: if the file is not JSON or not a soup record.
    """
    return _read(folder / SOUP_FILE, SoupRecord)


def write_record(folder: Path, record: ExpertRecord | SoupRecord) -> Path:
    """Write `record` under its own name into `folder` and return the file's path.

    The keys stand in the order of the model's fields, so that equal records have equal bytes.
    """
    path = folder / (EXPERT_FILE if isinstance(record, ExpertRecord) else SOUP_FILE)
    text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def library_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of this package and of `packages`, read from their metadata without an import."""
    from personalized_soups import __version__

    versions = {"python": platform.python_version(), "personalized_soups": __version__}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _read(path: Path, model: type[Record]) -> Record | None:
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            raise FileFormatError(
                f"the record is larger than {_MAX_RECORD_BYTES >> 20} MiB", where=str(path), mend="write it anew"
            )
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check its permissions"
        ) from error
    try:
        record = model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(
            f"this is no {model.__name__}: {first['msg']}",
            where=f"{path}: {key}" if key else str(path),
            mend=f"restore {path.name}, or take it away: a LoRA folder without it is an expert too"
            if path.name == EXPERT_FILE
            else f"restore {path.name}, or merge again",
        ) from None
    parse_json(text, path)  # pydantic lets NaN and repeated keys pass where a field takes anything
    return record
