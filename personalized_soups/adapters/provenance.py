"""The records `expert.json` and `soup.json`, which say how an expert was trained and how a soup was merged.

A record is in the folder of the tensors. A soup is the weighted sum of experts.
"""

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

# soup.json has one line per module, so this size is enough for a million modules.
_MAX_RECORD_BYTES = 256 << 20


class BaseRecord(Declared):
    """A base model: its name and its fingerprint."""

    name: str | None = Field(default=None, description="Path or hub id of the base model, as the user gave it.")
    fingerprint: str | None = Field(default=None, description="Fingerprint of the base model, from base_fingerprint().")


class BaseAdapterRecord(Declared):
    """A base adapter: the adapter, such as an SFT adapter, on top of which experts were trained."""

    name: str = Field(description="Name of the adapter's folder.")
    digest: str = Field(description="Digest of the adapter, from BaseAdapter.digest.")


class DataRecord(Declared):
    """The preference pairs that an expert was trained on."""

    name: str = Field(description="Name of the file with the pairs.")
    blake3: str = Field(description="BLAKE3 digest of the file, in hex.")
    num_pairs: int = Field(ge=0)


class ExpertRecord(Declared):
    """expert.json: an expert's side and how it was trained."""

    format_version: Literal[1] = 1
    side: str | None = Field(
        min_length=1,
        description="The side that the expert was trained for. null if all users' pairs trained it together.",
    )
    dimension: str | None = Field(default=None, description="The dimension of that side.")
    base: BaseRecord = Field(default_factory=BaseRecord)
    on: BaseAdapterRecord | None = Field(
        default=None,
        description="The adapter on top of which the expert was trained. Left out for an expert trained on the base "
        "alone.",
    )
    method: Literal["sft", "reward", "grpo"] | None = Field(
        default=None,
        description="The method of the training. Left out for DPO. With `reward`, the adapter is a reward model.",
    )
    recipe: dict[str, Any] = Field(default_factory=dict, description="All hyperparameters of the training.")
    basis: Literal["free", "shared", "core"] = "free"
    data: DataRecord | None = None
    seed: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    files: tuple[str, ...] = Field(default=(), description="All files of the folder that the training wrote.")

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out fields that are None and that older versions of the package did not write."""
        return _without_none(serialize(self), "on", "method")


class InputRecord(Declared):
    """One expert of a soup."""

    name: str
    folder: str
    weight: float
    blake3: dict[str, str] = Field(description="BLAKE3 digest of each file that was read, in hex.")


class MethodRecord(Declared):
    """A merge method that is not part of this package: its function, and the digest of its source file.

    The package never imports a module only because a record names it: records may come from untrusted sources.
    """

    module: str = Field(description="The module that defines the function.")
    function: str = Field(description="The function's qualified name.")
    blake3: str = Field(description="BLAKE3 digest of the module's source file, in hex.")


class TruncationRecord(Declared):
    """The result of a truncation to a lower rank. Errors are relative Frobenius errors of the delta."""

    rank: int = Field(description="The highest rank among the modules.")
    energy: float | None = Field(default=None, description="The requested share of the energy, if any.")
    total: float = Field(ge=0)
    modules: dict[str, float] = Field(default_factory=dict)
    ranks: dict[str, int] = Field(
        default_factory=dict, description="Rank of each module whose rank is lower than the highest."
    )


class SoupRecord(Declared):
    """soup.json: the experts of a merged adapter or model, and how they were merged."""

    format_version: Literal[1] = 1
    kind: Literal["adapter", "model"]
    profile: dict[str, Any] = Field(description="The profile, as the user declared it.")
    method: str
    method_source: MethodRecord | None = Field(
        default=None,
        description="The function of a method that is not part of this package. Left out for a built-in method.",
    )
    options: dict[str, float] = Field(default_factory=dict, description="All options of the method.")
    encoding: Literal["stacked", "truncated", "folded"]
    target: Literal["peft", "vllm"] = "peft"
    experts: tuple[InputRecord, ...]
    base: BaseRecord
    base_folder: str | None = Field(
        default=None, description="For a merged adapter: the folder of the base, if the merge read the base."
    )
    base_blake3: dict[str, str] = Field(
        default_factory=dict, description="BLAKE3 digest of each weight file of the base, if the merge read the base."
    )
    on: BaseAdapterRecord | None = Field(
        default=None,
        description="The adapter on top of which the experts were trained. Left out if there is none.",
    )
    on_folder: str | None = Field(
        default=None,
        description="The folder of that adapter, if the soup includes the adapter's delta. Left out if the adapter "
        "must be loaded in addition to the soup.",
    )
    untied: str | None = Field(
        default=None,
        description="Name of the output embedding's tensor, if the merge separated the base's tied embeddings.",
    )
    rank: int | None = Field(default=None, description="The merged adapter's rank; null for a folded model.")
    dtype: str
    device: str
    truncation: TruncationRecord | None = None
    vllm_max_lora_rank: int | None = Field(
        default=None, description="The smallest --max-lora-rank with which vLLM loads the adapter."
    )
    versions: dict[str, str] = Field(default_factory=dict)
    files: tuple[str, ...] = Field(default=(), description="All files of the folder that the merge wrote.")

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out fields that are None and that older versions of the package did not write."""
        return _without_none(serialize(self), "method_source", "on", "on_folder")


Record = TypeVar("Record", bound=Declared)


def read_expert_record(folder: Path) -> ExpertRecord | None:
    """Return the contents of `expert.json` in `folder`, or None if the file does not exist.

    Raises:
        FileFormatError: if the file is not JSON or is not a valid expert record.
        InputError: if the file cannot be read.
    """
    return _read(folder / EXPERT_FILE, ExpertRecord)


def read_soup_record(folder: Path) -> SoupRecord | None:
    """Return the contents of `soup.json` in `folder`, or None if the file does not exist.

    Raises:
        FileFormatError: if the file is not JSON or is not a valid soup record.
        InputError: if the file cannot be read.
    """
    return _read(folder / SOUP_FILE, SoupRecord)


def write_record(folder: Path, record: ExpertRecord | SoupRecord) -> Path:
    """Write an expert record to `expert.json` or a soup record to `soup.json` in `folder`, and return the path.

    The keys are in the order of the record's fields, so equal records have equal bytes.
    """
    path = folder / (EXPERT_FILE if isinstance(record, ExpertRecord) else SOUP_FILE)
    text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _without_none(table: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the table without those of the named keys whose value is None."""
    return {name: value for name, value in table.items() if value is not None or name not in names}


def library_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, this package and the installed ones of `packages`. No package is imported."""
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
                f"the record is larger than the maximum of {_MAX_RECORD_BYTES >> 20} MiB",
                where=str(path),
                mend=f"restore {path.name} from a backup",
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
            f"the record is invalid: {first['msg']}",
            where=f"{path}: {key}" if key else str(path),
            mend=f"restore {path.name}, or delete it: a LoRA folder without this file is also an expert"
            if path.name == EXPERT_FILE
            else f"restore {path.name}, or merge the experts again",
        ) from None
    parse_json(text, path)  # raises for NaN and repeated keys, which pydantic accepts in fields of type Any
    return record
