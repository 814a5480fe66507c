"""Descriptions of a folder with an expert, a soup, a base model or a library, for people and programs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personalized_soups.adapters.library import Expert, ExpertLibrary, is_adapter
from personalized_soups.adapters.provenance import BaseAdapterRecord, SoupRecord, read_soup_record
from personalized_soups.errors import InputError, SoupError
from personalized_soups.files.file_names import CONFIG_FILE, MODEL_CONFIG_FILE, MODEL_INDEX_FILE, MODEL_WEIGHTS_FILE
from personalized_soups.files.shards import Checkpoint
from personalized_soups.files.strict_json import parse_json

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Description:
    """The description of a folder.

    Attributes:
        kind: expert, merged adapter, merged model, model or library.
        facts: the properties of the folder, by name.
        members: for a library, the properties of each expert, by name.
    """

    kind: str
    facts: Facts
    members: Sequence[Facts] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return the kind, the facts and, for a library, the members as one JSON object."""
        described = {"kind": self.kind, **self.facts}
        return {**described, "experts": list(self.members)} if self.kind == "library" else described


def describe(folder: Path | str) -> Description:
    """Return the description of a folder. Only headers, configurations and records are read, not tensors.

    Raises:
        InputError: if the folder does not exist, or has none of the kinds that `Description` lists.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # noqa: PTH112 # Path.is_dir() raises if the name is too long
        raise InputError("the folder does not exist", where=str(folder), mend="check the path")
    soup = read_soup_record(folder)
    if is_adapter(folder):
        expert = Expert(folder.resolve().name, folder)
        kind = "expert" if soup is None else "merged adapter"
        return Description(kind, {"folder": str(folder), **_of_adapter(expert), **_of_expert(expert), **_of_soup(soup)})
    if (folder / MODEL_WEIGHTS_FILE).is_file() or (folder / MODEL_INDEX_FILE).is_file():
        kind = "model" if soup is None else "merged model"
        return Description(kind, {"folder": str(folder), **_of_model(folder), **_of_soup(soup)})
    try:
        library = ExpertLibrary.open(folder)
    except InputError:
        raise InputError(
            "the folder is neither an adapter, nor a model, nor a library of experts",
            where=str(folder),
            mend=f"give a folder that contains {CONFIG_FILE}, {MODEL_WEIGHTS_FILE}, or adapter folders",
        ) from None
    return Description(
        "library",
        {"folder": str(folder), "num_experts": len(library)},
        [_member(expert) for expert in library.values()],
    )


def _of_adapter(expert: Expert) -> Facts:
    modules = expert.adapter.modules.values()
    return {
        "base": expert.base.name,
        "base_fingerprint": expert.base.fingerprint,
        "rank": _range([module.rank for module in modules]),
        "scaling": _range([module.scaling for module in modules]),
        "num_modules": len(modules),
        "layers": sorted({module.name.rpartition(".")[2] for module in modules}),
        "dtype": ", ".join(sorted(expert.adapter.dtypes)),
        "num_parameters": sum(module.rank * (module.in_features + module.out_features) for module in modules),
        "num_bytes": expert.adapter.num_bytes,
    }


def _of_expert(expert: Expert) -> Facts:
    if expert.record is None:
        return {}
    facts = expert.record.model_dump(mode="json", include={"side", "dimension", "basis", "data", "seed", "metrics"})
    return {**facts, **_of_on(expert.record.on)}


def _of_soup(soup: SoupRecord | None) -> Facts:
    if soup is None:
        return {}
    return {
        "user": soup.profile.get("user"),
        "method": soup.method,
        "encoding": soup.encoding,
        **_of_on(soup.on),
        **({} if soup.on is None else {"includes_on": soup.on_folder is not None}),
        "weights": {expert.name: expert.weight for expert in soup.experts},
        "truncation_error": None if soup.truncation is None else soup.truncation.total,
        "vllm_max_lora_rank": soup.vllm_max_lora_rank,
        "versions": soup.versions,
    }


def _of_on(on: BaseAdapterRecord | None) -> Facts:
    """Return the adapter on top of which an expert, or the experts of a soup, were trained; empty if there is none."""
    return {} if on is None else {"on": on.name, "on_digest": on.digest}


def _of_model(folder: Path) -> Facts:
    checkpoint = Checkpoint.open(folder)
    entries = [checkpoint.entry(name) for name in checkpoint]
    path = folder / MODEL_CONFIG_FILE
    config = parse_json(path.read_bytes(), path) if path.is_file() else {}
    return {
        "architecture": ", ".join(config.get("architectures") or []) if isinstance(config, dict) else None,
        "num_tensors": len(entries),
        "num_parameters": sum(math.prod(entry.shape) for entry in entries),
        "dtype": ", ".join(sorted({entry.dtype for entry in entries})),
        "num_shards": len(checkpoint.shards),
        "num_bytes": checkpoint.num_bytes,
    }


def _member(expert: Expert) -> Facts:
    try:
        adapter, record = expert.adapter, expert.record
    except SoupError as fault:
        return {"name": expert.name, "side": None, "dimension": None, "rank": None, "base": None, "fault": fault.what}
    return {
        "name": expert.name,
        "side": None if record is None else record.side,
        "dimension": None if record is None else record.dimension,
        "rank": _range([module.rank for module in adapter.modules.values()]),
        "base": expert.base.name,
        "fault": None,
    }


def _range(values: Sequence[float]) -> float | str:
    low, high = min(values), max(values)
    return low if low == high else f"{low:g} to {high:g}"
