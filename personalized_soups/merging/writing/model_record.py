"""The JSON files of a merged model.

soup.json is always written. The base's config.json and index change only if the soups untie the embeddings, so that the
output embedding becomes a separate tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from blake3 import blake3

from personalized_soups.adapters.provenance import (
    BaseRecord,
    InputRecord,
    SoupRecord,
    library_versions,
)
from personalized_soups.files.atomic import files_below
from personalized_soups.files.copies import CopyMode
from personalized_soups.files.file_names import MODEL_CONFIG_FILE, MODEL_INDEX_FILE, SOUP_FILE
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.merging.planning.plan import MergePlan


def untied_tables(changes: Changes) -> dict[str, object]:
    """Return the changed content of the base's config.json and index, by file name.

    The result is empty unless the soups untie the embeddings, so that the output embedding becomes a separate tensor.
    """
    if changes.unties is None:
        return {}
    assert changes.model.tied is not None
    config = dict(changes.model.config)
    for key, value in config.items():
        if isinstance(value, dict) and "tie_word_embeddings" in value:
            config[key] = {**value, "tie_word_embeddings": False}
    config["tie_word_embeddings"] = False
    tables: dict[str, object] = {MODEL_CONFIG_FILE: config}
    index = changes.model.folder / MODEL_INDEX_FILE
    if changes.model.checkpoint.has_index and changes.unties not in changes.model.checkpoint:
        table = json.loads(index.read_bytes())
        source = changes.model.checkpoint.entry(changes.model.tied[0])
        # the base's index may lack the tied tensor, so the name of the shard comes from the checkpoint
        table["weight_map"][changes.unties] = changes.model.checkpoint.shard_of(changes.model.tied[0]).path.name
        if "total_size" in table.get("metadata", {}):
            table["metadata"]["total_size"] += source.end - source.start
        tables[MODEL_INDEX_FILE] = table
    return tables


def json_text(table: object) -> str:
    """Return the text with which a JSON file of a model folder holds `table`."""
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def identity(plan: MergePlan, files: Sequence[Path], device: torch.device, untouched: CopyMode) -> str:
    """Return a digest of everything that decides the shards' bytes.

    An interrupted merge is resumed only if the digest is the same. Files enter the digest with their sizes and
    modification times, because hashing their content would take as long as the merge.

    Args:
        plan: the plan of the merge.
        files: the files that the merge reads.
        device: the device that computes the soup.
        untouched: how unchanged shards are copied.
    """
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    deciding = [
        plan.profile.model_dump(mode="json"),
        plan.method.name,
        dict(plan.options),
        [(expert.name, expert.folder, expert.weight) for expert in plan.experts],
        states,
        device.type,
        untouched,
        library_versions("torch"),
        *([] if plan.method_source is None else [plan.method_source.model_dump()]),
        *([] if plan.on is None else [plan.on.model_dump()]),
    ]
    return str(blake3(json.dumps(deciding, sort_keys=True).encode()).hexdigest())


def model_record(
    plan: MergePlan, changes: Changes, inputs: tuple[InputRecord, ...], digests: Mapping[Path, str], folder: Path
) -> SoupRecord:
    """Return the content of soup.json for a merged model.

    Args:
        plan: the plan of the merge.
        changes: the changes that the soups make to the base.
        inputs: the records of the experts.
        digests: the BLAKE3 digest of every shard of the base, by the shard's path.
        folder: the model's folder. All of its other files must be written already.
    """
    model = changes.model
    changed = {model.checkpoint.entry(name).dtype for name in changes.changes if name in model.checkpoint}
    return SoupRecord(
        kind="model",
        profile=plan.profile.model_dump(mode="json"),
        method=plan.method.name,
        method_source=plan.method_source,
        options=dict(plan.options),
        encoding="folded",
        experts=inputs,
        base=BaseRecord(name=model.name, fingerprint=model.fingerprint),
        on=plan.on,
        on_folder=plan.on_folder,
        untied=changes.unties,
        base_blake3={shard.path.name: digests[shard.path] for shard in model.checkpoint.shards.values()},
        dtype=", ".join(sorted(changed)),
        device=str(changes.soups.bank.device),
        versions=library_versions("torch", "numpy"),
        files=tuple(sorted({SOUP_FILE, *files_below(folder)})),
    )
