"""Soups folded into their base: full model folders, written while the base is read, once for any number of soups."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

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
from personalized_soups.files.atomic import Resumable, check_replaceable, check_target, files_below, resumable_folder
from personalized_soups.files.copies import CopyMode, copy_file
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.files.file_names import MODEL_CONFIG_FILE, MODEL_INDEX_FILE, SOUP_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.writer import SafetensorsWriter, TensorSpec
from personalized_soups.launching.threads import in_order, num_file_threads
from personalized_soups.merging.computing.blocks import folded_blocks
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan, plan_merge, resolve_device
from personalized_soups.merging.writing.adapter import check_output_apart, input_records
from personalized_soups.methods.finite import all_finite

Progress = Callable[[int, int], None]


class Sink(Protocol):
    """Where the tensors of one shard go; several threads give at once. See files.writer.SafetensorsWriter."""

    def write(self, name: str, data: Tensor | memoryview, start: int = 0) -> None:
        """Take a part of a tensor, from its byte `start` on."""
        ...

    def copy(self, names: Sequence[str], source: SafetensorsFile) -> None:
        """Take whole tensors as they stand in `source`."""
        ...


@dataclass(frozen=True, eq=False)
class MergedModel:
    """A soup that can be folded into a base and written as a model folder. Nothing is computed before `write`.

    Attributes:
        plan: the plan of the merge, made with `into_base=True`.
        library: the experts.
        base: the base model: a folder, or a hub id in the local cache.
        device: where the arithmetic runs.
        same_base: fold the soup into this base even if the experts recorded another fingerprint.
    """

    plan: MergePlan
    library: ExpertLibrary
    base: Path | str
    device: torch.device
    same_base: bool = False

    @classmethod
    def of(
        cls, library: ExpertLibrary, profile: Profile, base: Path | str, options: MergeOptions | None = None
    ) -> Self:
        """Plan the merge of `profile` into `base`; the base is not opened.

        Raises:
            SoupError: all errors of plan_merge; UsageError if the device is unknown or missing.
        """
        options = options or MergeOptions()
        plan = plan_merge(library, profile, options, into_base=True)
        return cls(plan, library, base, resolve_device(options.device), options.same_base)

    def check(self, folder: Path | str | None = None, overwrite: bool = False) -> None:
        """Raise the errors of `write` that the files' headers show. Nothing is written.

        Fingerprints are not compared, since that reads the base's tensors.

        Args:
            folder: the new folder; None checks the inputs alone.
            overwrite: replace the folder if this tool wrote it.

        Raises:
            SoupError: as `write`, except for errors in the tensors' values, another base and a full disk.
        """
        if folder is not None:
            check_output_apart(Path(folder), self.plan.input_folders)
            check_replaceable(Path(folder).absolute(), overwrite=overwrite)
        model = BaseModel.open(self.base)
        if folder is not None:
            check_output_apart(Path(folder), [model.folder])
        bank = ExpertBank([self.library[expert.name] for expert in self.plan.experts])
        Changes.of(Soups([self.plan], bank), model)

    def write(
        self,
        folder: Path | str,
        overwrite: bool = False,
        durable: bool = False,
        *,
        untouched: CopyMode = "copy",
        progress: Progress | None = None,
    ) -> Path:
        """Write the model folder, and return it. See merge_into_base."""
        fold_plans(
            self.library,
            [self.plan],
            [Path(folder)],
            self.base,
            device=self.device,
            same_base=self.same_base,
            overwrite=overwrite,
            durable=durable,
            untouched=untouched,
            progress=progress,
        )
        return Path(folder)


def merge_into_base(
    library: ExpertLibrary,
    profile: Profile,
    base: Path | str,
    out: Path | str,
    options: MergeOptions | None = None,
    *,
    overwrite: bool = False,
    durable: bool = False,
    untouched: CopyMode = "copy",
    progress: Progress | None = None,
) -> Path:
    """Write the base with the soup of `profile` added to it as a model folder, and return the folder.

    Adapted tensors are accumulated in float32 (float64 if the base's tensor is float64) and rounded once to the base's
    dtype. All other tensors are copied byte for byte, in the base's order and shards, and so are all files without
    weights. Memory: a few blocks of rows and the factors in use, regardless of the model's size. An interrupted run
    resumes at the first incomplete shard, if the inputs and options are the same.

    Args:
        library: the experts.
        profile: the user's weights.
        base: the base model's folder, or a hub id in the local cache.
        out: the new folder.
        options: the choices that override the profile's; the defaults if left out. A folded model has no rank, and
            keeps the base's dtypes.
        overwrite: replace `out` if this tool wrote it.
        durable: write all bytes to the disk before the folder appears.
        untouched: how to copy a shard that the soup does not change: `copy`, `reflink` (shares blocks if the file
            system can) or `link` (the base's own file under a second name, which must not be edited).
        progress: called with the bytes of tensors that are done and the total.

    Raises:
        SoupError: all errors of plan_merge; IncompatibleExpertsError if the base lacks an adapted module or has it in
            another shape; UnsupportedAdapterError if the base is quantised.
    """
    merged = MergedModel.of(library, profile, base, options)
    return merged.write(out, overwrite, durable, untouched=untouched, progress=progress)


def fold_plans(
    library: ExpertLibrary,
    plans: Sequence[MergePlan],
    outs: Sequence[Path],
    base: Path | str,
    *,
    device: torch.device,
    same_base: bool = False,
    overwrite: bool = False,
    durable: bool = False,
    untouched: CopyMode = "copy",
    progress: Progress | None = None,
) -> None:
    """Write the soups of plans over the same experts into one folder each, and read the base once.

    See merge_into_base.
    """
    experts = [library[expert.name] for expert in plans[0].experts]
    for out in outs:
        check_output_apart(out, plans[0].input_folders)
        check_target(out, overwrite=overwrite)
    model = BaseModel.open(base)
    for out in outs:
        check_output_apart(out, [model.folder])
    if not same_base:
        model.check_fingerprints(experts)
    soups = Soups(plans, ExpertBank(experts, device=device))
    changes = Changes.of(soups, model)
    changes.soups.prepare()
    shards = [shard.path for shard in model.checkpoint.shards.values()]
    read = [path for expert in experts for path in expert.adapter.files]
    # the configuration says whether embeddings are tied, and so which tensors there are
    deciding = [*read, *shards, model.folder / MODEL_CONFIG_FILE]
    with ExitStack() as stack:
        folders = [
            stack.enter_context(
                resumable_folder(out, _identity(plan, deciding, device, untouched), overwrite, durable=durable)
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
        None if plan.method_source is None else plan.method_source.model_dump(),
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
        method_source=plan.method_source,
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
