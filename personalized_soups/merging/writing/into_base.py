"""Soups folded into their base: full model folders, written while the base is read, once for any number of soups."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor

from personalized_soups.adapters.base_model import BaseModel, copy_others
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import (
    BaseRecord,
    InputRecord,
    SoupRecord,
    library_versions,
    write_record,
)
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import InputError
from personalized_soups.files.atomic import Resumable, check_target, files_below, resumable_folder
from personalized_soups.files.copies import CopyMode, copy_file
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.files.file_names import MODEL_CONFIG_FILE, MODEL_INDEX_FILE, SOUP_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.writer import SafetensorsWriter, TensorSpec
from personalized_soups.launching.threads import in_order, num_file_threads
from personalized_soups.merging.computing.blocks import folded_blocks
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.planning.plan import MergePlan, plan_merge, resolve_device
from personalized_soups.merging.writing.adapter import check_output_apart, input_records
from personalized_soups.methods.finite import all_finite
from personalized_soups.methods.method import Method

Progress = Callable[[int, int], None]


class Sink(Protocol):
    """Where the tensors of one shard go; several threads give at once. See files.writer.SafetensorsWriter."""

    def write(self, name: str, data: Tensor | memoryview, start: int = 0) -> None:
        """Take a part of a tensor, from its byte `start` on."""
        ...

    def copy(self, names: Sequence[str], source: SafetensorsFile) -> None:
        """Take whole tensors as they stand in `source`."""
        ...


def merge_into_base(
    library: ExpertLibrary,
    profile: Profile,
    base: Path | str,
    out: Path | str,
    *,
    method: str | Method | None = None,
    options: Mapping[str, float] | None = None,
    device: str = "auto",
    same_base: bool = False,
    overwrite: bool = False,
    durable: bool = False,
    untouched: CopyMode = "copy",
    progress: Progress | None = None,
) -> Path:
    """Write the base with the soup of `profile` added to it as a model folder, and return the folder.

    Adapted tensors are accumulated in float32 (float64 where the base is) and rounded once to the base's dtype; every
    other tensor is copied byte for byte, in the base's own order and shards, and so is every file that holds no
    weights. Memory: a few blocks of rows and the factors in work, whatever the model's size. An interrupted run is gone
    on with by the next one of the same inputs, from the first shard that is not whole.

    Args:
        library: where the experts are.
        profile: who it is for.
        base: the base model's folder, or a hub id in the local cache.
        out: the new folder.
        method: overrides the profile's.
        options: of the method; each overrides the profile's.
        device: where the arithmetic is done: auto (the CPU), cpu, cuda.
        same_base: take it that this is the experts' base, whatever the fingerprints say.
        overwrite: replace `out` where this tool wrote it.
        durable: have all bytes on the disk before the folder appears.
        untouched: how a shard that the soup leaves as it is comes into the folder: `copy`, `reflink` (sharing blocks
            where the file system can), or `link` (the base's own file under a second name, not to be edited).
        progress: called with the bytes of tensors done and in all.

    Raises:
        SoupError: everything that plan_merge raises; IncompatibleExpertsError where an adapted module is not in the
            base or of another shape; UnsupportedAdapterError where the base is quantised.
    """
    plan = plan_merge(library, profile, method=method, options=options, same_base=same_base, into_base=True)
    fold_plans(
        library,
        [plan],
        [Path(out)],
        base,
        device=device,
        same_base=same_base,
        overwrite=overwrite,
        durable=durable,
        untouched=untouched,
        progress=progress,
    )
    return Path(out)


def fold_plans(
    library: ExpertLibrary,
    plans: Sequence[MergePlan],
    outs: Sequence[Path],
    base: Path | str,
    *,
    device: str = "auto",
    same_base: bool = False,
    overwrite: bool = False,
    durable: bool = False,
    untouched: CopyMode = "copy",
    progress: Progress | None = None,
) -> None:
    """Write the soups of plans over the same experts into folders of their own, reading the base once.

    See merge_into_base.
    """
    target = resolve_device(device)
    experts = [library[expert.name] for expert in plans[0].experts]
    inputs = [expert.folder for expert in plans[0].experts]
    for out in outs:
        check_output_apart(out, inputs)
        check_target(out, overwrite=overwrite)
    model = BaseModel.open(base)
    for out in outs:
        check_output_apart(out, [str(model.folder)])
    if not same_base:
        model.check_fingerprints(experts)
    soups = Soups(plans, ExpertBank(experts, device=target))
    changes = Changes.of(soups, model)
    changes.soups.prepare()
    shards = [shard.path for shard in model.checkpoint.shards.values()]
    read = [path for expert in experts for path in expert.adapter.files]
    # the configuration says whether embeddings are tied, and so which tensors there are
    deciding = [*read, *shards, model.folder / MODEL_CONFIG_FILE]
    with ExitStack() as stack:
        folders = [
            stack.enter_context(
                resumable_folder(out, _identity(plan, deciding, target, untouched), overwrite, durable=durable)
            )
            for plan, out in zip(plans, outs, strict=True)
        ]
        digests = stack.enter_context(BackgroundDigests([*read, *shards]))
        _write_shards(changes, folders, untouched, progress)
        for plan, each in zip(plans, folders, strict=True):
            copy_others(model, each.folder)
            for name, table in untied_tables(changes).items():
                (each.folder / name).write_text(json_text(table), encoding="utf-8")
            taken = input_records(plan, library, digests.results())
            write_record(each.folder, model_record(plan, changes, taken, digests.results(), each.folder))


def check_fits(library: ExpertLibrary, plan: MergePlan, base: Path | str) -> None:
    """Raise if a soup cannot be folded into `base`, from headers alone: what a dry run can know.

    Fingerprints are not compared: that reads the base's weights.

    Raises:
        SoupError: as merge_into_base does for a base that is not there, damaged, quantised or of other shapes.
    """
    bank = ExpertBank([library[expert.name] for expert in plan.experts])
    Changes.of(Soups([plan], bank), BaseModel.open(base))


def fold_shard(source: SafetensorsFile, changes: Changes, sinks: Mapping[int, Sink]) -> Iterator[int]:
    """Give every tensor of a shard to the sink of each soup, changed by it; yield the bytes done, piece by piece.

    Several threads work on a tensor each; its bytes do not depend on their number.

    Args:
        source: one shard of the base.
        changes: what the soups change.
        sinks: by the soup's place in `changes.soups.plans`; soups without one are left out.

    Raises:
        InputError: if the base holds NaN or infinity, or a soup has values beyond the base's dtype.
    """

    def done(names: Sequence[str]) -> int:
        if len(names) == 1 and changes.touches(names[0]):
            _fold_tensor(source, names[0], changes, sinks)
        else:
            for sink in sinks.values():
                sink.copy(names, source)
        return sum(source.entry(name).end - source.entry(name).start for name in names)

    return in_order(done, _pieces(source, changes), num_file_threads(changes.soups.bank.device))


def _fold_tensor(source: SafetensorsFile, name: str, changes: Changes, sinks: Mapping[int, Sink]) -> None:
    base = source.tensor(name)
    for written in changes.written_as(name):
        base_MN = changes.as_matrix(written, base)
        row_bytes = base_MN.shape[1] * base_MN.element_size()
        terms = changes.terms(written, base_MN)
        wanted = list(sinks)
        if not any(terms[soup] for soup in wanted):
            for soup in wanted:
                sinks[soup].write(written, source.raw(name))
            continue
        device = changes.soups.bank.device
        for block in folded_blocks(base_MN, [terms[soup] for soup in wanted], device):
            if not block.is_finite():
                _raise_not_finite(written, base_MN[block.start : block.start + block.rows_BN.shape[0]])
            sinks[wanted[block.soup]].write(written, block.rows_BN.reshape(-1), block.start * row_bytes)


def _pieces(source: SafetensorsFile, changes: Changes) -> Iterator[Sequence[str]]:
    """Yield the tensors in the order of the file: changed ones each by itself, stretches of others together."""
    stretch: list[str] = []
    for name in source.entries:
        if not changes.touches(name):
            stretch.append(name)
            continue
        if stretch:
            yield stretch
            stretch = []
        yield [name]
    if stretch:
        yield stretch


def _write_shards(
    changes: Changes, folders: Sequence[Resumable], untouched: CopyMode, progress: Progress | None
) -> None:
    model = changes.model
    total = sum(source.num_bytes - source.header_bytes for source in model.checkpoint.shards.values())
    before = 0
    for file, source in model.checkpoint.shards.items():
        wanted = {number: each for number, each in enumerate(folders) if file not in each.done}
        done = before
        for num_bytes in _write_shard(file, source, changes, wanted, untouched):
            done += num_bytes
            if progress is not None:
                progress(done, total)
        for each in wanted.values():
            each.mark(file)
        before += source.num_bytes - source.header_bytes
        if progress is not None and done < before:
            progress(before, total)


def _write_shard(
    file: str, source: SafetensorsFile, changes: Changes, wanted: Mapping[int, Resumable], untouched: CopyMode
) -> Iterator[int]:
    if not any(changes.touches(name) for name in source.entries):
        for each in wanted.values():
            copy_file(source.path, each.folder / file, untouched)
        return
    if not wanted:
        return
    specs = shard_specs(source, changes)
    with ExitStack() as stack:
        sinks: dict[int, Sink] = {
            number: stack.enter_context(SafetensorsWriter(each.folder / file, specs, source.metadata))
            for number, each in wanted.items()
        }
        yield from fold_shard(source, changes, sinks)


def _raise_not_finite(name: str, before: Tensor) -> None:
    damaged = not all_finite(before)
    raise InputError(
        f"{name}: the base itself holds NaN or infinity"
        if damaged
        else f"{name}: the soup has values beyond {before.dtype}",
        where=name,
        mend="give a sound base" if damaged else "take smaller weights, or a base in float32 or bfloat16",
    )


def untied_tables(changes: Changes) -> dict[str, object]:
    """Return the tables of the base, by file, that must say that its output embedding is now a tensor of its own."""
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
        # the index itself may not name the tensor
        table["weight_map"][changes.unties] = changes.model.checkpoint.shard_of(changes.model.tied[0]).path.name
        if "total_size" in table.get("metadata", {}):
            table["metadata"]["total_size"] += source.end - source.start
        tables[MODEL_INDEX_FILE] = table
    return tables


def json_text(table: object) -> str:
    """Return a table of a model folder as it is written."""
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def shard_specs(source: SafetensorsFile, changes: Changes) -> list[TensorSpec]:
    """Return the tensors that a shard of the base becomes, in their order."""
    return [
        TensorSpec(name, entry.dtype, entry.shape)
        for entry in source.entries.values()
        for name in changes.written_as(entry.name)
    ]


def _identity(plan: MergePlan, files: Sequence[Path], device: torch.device, untouched: CopyMode) -> str:
    """Return what decides the bytes of the shards; files count by size and time, since digests would cost the merge."""
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    told = [
        plan.profile.model_dump(mode="json"),
        plan.method.name,
        dict(plan.options),
        [(expert.name, expert.folder, expert.weight) for expert in plan.experts],
        states,
        device.type,
        untouched,
        library_versions("torch"),
    ]
    return str(blake3(json.dumps(told, sort_keys=True).encode()).hexdigest())


def model_record(
    plan: MergePlan, changes: Changes, inputs: tuple[InputRecord, ...], digests: Mapping[Path, str], folder: Path
) -> SoupRecord:
    """Return what soup.json says of a merged model; `folder` holds all of its other files."""
    model = changes.model
    changed = {model.checkpoint.entry(name).dtype for name in changes.changes if name in model.checkpoint}
    return SoupRecord(
        kind="model",
        profile=plan.profile.model_dump(mode="json"),
        method=plan.method.name,
        options=dict(plan.options),
        encoding="folded",
        experts=inputs,
        base=BaseRecord(name=model.name, fingerprint=model.fingerprint),
        untied=changes.unties,
        base_blake3={path.name: digests[path] for path in (each.path for each in model.checkpoint.shards.values())},
        dtype=", ".join(sorted(changed)),
        device=str(changes.soups.bank.device),
        versions=library_versions("torch", "numpy"),
        files=tuple(sorted({SOUP_FILE, *files_below(folder)})),
    )
