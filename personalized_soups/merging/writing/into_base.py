"""Fold soups into their base model, and write one full model folder for each soup. The base is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from personalized_soups.adapters.base_model import BaseModel, copy_others
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import (
    write_record,
)
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.devices import MERGE_DEVICES, resolve_device
from personalized_soups.files.atomic import Resumable, check_replaceable, check_target, resumable_folder
from personalized_soups.files.copies import CopyMode, copy_file
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.files.file_names import MODEL_CONFIG_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.writer import SafetensorsWriter
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.planning.base_adapter import check_includes_adapter
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan
from personalized_soups.merging.planning.planner import plan_merge
from personalized_soups.merging.writing.inputs import check_output_apart, input_records
from personalized_soups.merging.writing.model_record import identity, json_text, model_record, untied_tables
from personalized_soups.merging.writing.model_shards import Sink, fold_shard, shard_specs

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class MergedModel:
    """A soup in the form of a full model: the base with the soup added. The tensors are computed by `write`.

    Attributes:
        plan: the plan of the merge, made with `into_base=True`.
        library: the experts.
        base: the folder of the base model, or the id of a model in the local hub cache.
        device: the device that computes the soup.
        same_base: accept this base even if the experts' records have another fingerprint.
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
        """Plan the merge of `profile` into `base`, without opening the base.

        Raises:
            UsageError: if the device is unknown or missing.
            SoupError: all errors of `plan_merge`.
        """
        options = options or MergeOptions()
        plan = plan_merge(library, profile, options, into_base=True)
        check_includes_adapter(plan)
        return cls(plan, library, base, resolve_device(options.device, kinds=MERGE_DEVICES), options.same_base)

    def check(self, folder: Path | str | None = None, overwrite: bool = False) -> None:
        """Raise the errors that `write` would raise, as far as the files' headers show them. Nothing is written.

        Fingerprints are not compared, because a fingerprint is computed from the values of the base's tensors.

        Args:
            folder: the new folder. With None, only the inputs are checked.
            overwrite: allow that the folder exists, if this tool wrote it.

        Raises:
            SoupError: as `write`, except for errors in the tensors' values, a wrong fingerprint and a full disk.
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
        """Write the model folder and return its path. `merge_into_base` describes the arguments and errors."""
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
    """Add the soup of `profile` to the base model, write the result as a full model folder, and return its path.

    Adapted tensors are summed in float32 (in float64 if the base's tensor is float64) and rounded once to the base's
    dtype. All other tensors and all files without weights are copied byte for byte. The shards and the order of the
    tensors are those of the base. Only a few blocks of rows and a few modules are in memory at once, regardless of the
    model's size. If a run is interrupted, a second run with the same inputs and options resumes at the first
    incomplete shard.

    Args:
        library: the experts.
        profile: the user's weights.
        base: the folder of the base model, or the id of a model in the local hub cache.
        out: the new folder.
        options: the choices that override those of the profile. The default is `MergeOptions()`. The options `rank`,
            `energy`, `dtype` and `base` must be left out, because a folded model keeps the base's dtypes and is not
            truncated.
        overwrite: replace `out` if it exists and this tool wrote it.
        durable: flush all bytes to the disk before the folder appears.
        untouched: how to copy a shard that the soup does not change. `copy` writes a new file. `reflink` shares the
            blocks of the base's file if the file system supports that. `link` gives the base's file a second name, so
            the file must not be edited.
        progress: a function that is called with the number of bytes that are done and the total number.

    Raises:
        IncompatibleExpertsError: if the base lacks an adapted module or has the module in another shape.
        UnsupportedAdapterError: if the base is quantized.
        SoupError: all errors of `plan_merge`.

    Example:
        >>> library = ExpertLibrary.open("experts")
        >>> profile = Profile(weights={"friendly": 0.6, "concise": 0.4})
        >>> merge_into_base(library, profile, TINY_BASE, "my-model").name
        'my-model'
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
    """Fold the soup of each plan into the base and write it to the folder of the same index in `outs`.

    All plans must have the same experts, so that the base is read once for all. `merge_into_base` describes the other
    arguments and the errors.
    """
    experts = [library[expert.name] for expert in plans[0].experts]
    check_includes_adapter(plans[0])
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
    read = [path for source in soups.sources for path in source.adapter.files]
    # config.json decides whether the embeddings are tied, and so which tensors are written
    deciding = [*read, *shards, model.folder / MODEL_CONFIG_FILE]
    with ExitStack() as stack:
        folders = [
            stack.enter_context(
                resumable_folder(out, identity(plan, deciding, device, untouched), overwrite, durable=durable)
            )
            for plan, out in zip(plans, outs, strict=True)
        ]
        digests = stack.enter_context(BackgroundDigests([*read, *shards]))
        _write_shards(changes, folders, untouched, progress)
        for plan, output in zip(plans, folders, strict=True):
            copy_others(model, output.folder)
            for name, table in untied_tables(changes).items():
                (output.folder / name).write_text(json_text(table), encoding="utf-8")
            inputs = input_records(plan, library, digests.results())
            write_record(output.folder, model_record(plan, changes, inputs, digests.results(), output.folder))


def _write_shards(
    changes: Changes, folders: Sequence[Resumable], untouched: CopyMode, progress: Progress | None
) -> None:
    """Write every shard to all folders that do not have the shard from an interrupted run."""
    model = changes.model
    total = sum(source.num_bytes - source.header_bytes for source in model.checkpoint.shards.values())
    before = 0
    for file, source in model.checkpoint.shards.items():
        wanted = {number: output for number, output in enumerate(folders) if file not in output.done}
        done = before
        for num_bytes in _write_shard(file, source, changes, wanted, untouched):
            done += num_bytes
            if progress is not None:
                progress(done, total)
        for output in wanted.values():
            output.mark(file)
        before += source.num_bytes - source.header_bytes
        if progress is not None and done < before:
            progress(before, total)


def _write_shard(
    file: str, source: SafetensorsFile, changes: Changes, wanted: Mapping[int, Resumable], untouched: CopyMode
) -> Iterator[int]:
    """Write one shard of every soup in `wanted`, and yield the numbers of bytes that are done."""
    if not any(changes.touches(name) for name in source.entries):
        for output in wanted.values():
            copy_file(source.path, output.folder / file, untouched)
        return
    if not wanted:
        return
    specs = shard_specs(source, changes)
    with ExitStack() as stack:
        sinks: dict[int, Sink] = {
            number: stack.enter_context(SafetensorsWriter(output.folder / file, specs, source.metadata))
            for number, output in wanted.items()
        }
        yield from fold_shard(source, changes, sinks)
