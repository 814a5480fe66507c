"""`verify` repeats the merge that the soup.json of a merged folder records, and compares the result with the folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.compatible import is_same_base
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import (
    InputRecord,
    SoupRecord,
    read_soup_record,
)
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.loader import load_data
from personalized_soups.declare.profile import Profile
from personalized_soups.devices import MERGE_DEVICES, resolve_device
from personalized_soups.errors import (
    DeclarationError,
    IncompatibleExpertsError,
    InputError,
    UnsupportedAdapterError,
    UsageError,
)
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.files.file_names import SOUP_FILE, WEIGHTS_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.merging.computing.merged_modules import common_ranks
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan, arithmetic_device
from personalized_soups.merging.planning.planner import plan_merge
from personalized_soups.merging.verify.adapter import AdapterComparison
from personalized_soups.merging.verify.model import compare_model
from personalized_soups.merging.verify.record import (
    configuration_faults,
    digest_faults,
    file_faults,
    fingerprint_faults,
    input_faults,
    method_faults,
    missing_method_fault,
    other_file_faults,
    record_faults,
)
from personalized_soups.merging.verify.verification import Comparison, Fault, Verification
from personalized_soups.merging.writing.adapter import MergedAdapter
from personalized_soups.merging.writing.adapter_record import adapter_config, adapter_record
from personalized_soups.merging.writing.inputs import input_records
from personalized_soups.merging.writing.model_record import model_record
from personalized_soups.methods.method import Method
from personalized_soups.methods.plugins import DenseMerge, find_method

Progress = Callable[[int, int], None]

# If planning the merge raises one of these errors, the inputs or the record have changed since the merge.
_UNPLANNABLE = (DeclarationError, IncompatibleExpertsError, UnsupportedAdapterError, UsageError)


def verify(
    folder: Path | str,
    *,
    base: Path | str | None = None,
    experts: Path | str | Sequence[Path | str] | None = None,
    on: Path | str | None = None,
    method: str | Method | DenseMerge | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Verification:
    """Repeat the merge that the soup.json of a merged adapter or model records, and compare every tensor and file.

    No file is written. An adapter is compared module by module, and a model block by block, so memory does not grow
    with the size of the model.

    Args:
        folder: a folder that a merge wrote.
        base: the base model, if it has moved since the merge. If an adapter was merged without a base, only the
            fingerprint of this base is compared with the recorded fingerprint.
        experts: experts, or folders of experts, that have moved since the merge. They are matched with the recorded
            experts by name.
        on: the adapter on top of which the experts were trained, if the soup includes it and it has moved since the
            merge.
        method: the merge method, if it is from outside this package. soup.json only describes such a method, and
            `verify` never imports what a file names. So if `method` is None, the tensors of such a soup are not
            recomputed.
        device: the device of the computation: auto (CUDA if there is a GPU, else the CPU), cpu, cuda or cuda:N.
        progress: a function that is called with the number of bytes that have been compared and the number of all
            bytes.

    Raises:
        InputError: if the folder does not exist or has no soup.json, or if an expert or the base is missing.
        FileFormatError: if a file is damaged.
        UsageError: if the soup was merged by a built-in method but `method` is another method, or if `method` cannot be
            used.

    Example:
        >>> folder = merge(ExpertLibrary.open("experts"), Profile(weights={"friendly": 1.0})).write("soup")
        >>> verify(folder).is_sound
        True
    """
    folder = Path(folder)
    record = _record_of(folder)
    given = _given_method(record, method)
    adapter = _on_of(record, on)
    library = _library(record, experts)
    resolve_device(device, kinds=MERGE_DEVICES)  # raises before any work is done
    faults = list(file_faults(folder, record))
    with BackgroundDigests([path for expert in library.values() for path in expert.adapter.files]) as digests:
        if given is None:
            faults += input_faults(record, library, digests.results())
            return Verification.of(str(folder), record.kind, None, [*faults, missing_method_fault(record)])
        try:
            plan = _plan(record, library, base, adapter, given)
            job = _Job(folder, record, plan, library, arithmetic_device(plan, device), digests)
            compared, other = job.adapter(base, progress) if record.kind == "adapter" else job.model(base, progress)
        except _UNPLANNABLE as error:
            faults += input_faults(record, library, digests.results())
            faults.append(Fault("record", error.where, f"the soup cannot be computed again: {error.what}"))
            return Verification.of(str(folder), record.kind, None, faults)
    faults += [*other, *method_faults(record, plan.method_source)]
    return Verification.of(str(folder), record.kind, compared, faults)


@dataclass(frozen=True, eq=False, slots=True)
class _Job:
    """The comparison of one soup whose merge can be repeated."""

    folder: Path
    record: SoupRecord
    plan: MergePlan
    library: ExpertLibrary
    device: torch.device
    digests: BackgroundDigests

    def adapter(self, base: Path | str | None, progress: Progress | None) -> tuple[Comparison | None, list[Fault]]:
        """Compare the tensors, the configuration and the record of a merged adapter."""
        compared: Comparison | None = None
        faults: list[Fault] = []
        if base is not None and self.record.base.fingerprint is not None:
            faults += fingerprint_faults(self.record, base_fingerprint(base), str(base))
        if (self.folder / WEIGHTS_FILE).is_file():
            file = SafetensorsFile.open(self.folder / WEIGHTS_FILE)
            comparison = AdapterComparison(file, MergedAdapter(self.plan, self.library, self.device))
            compared = comparison.run(progress)
            ranks = common_ranks(self.plan, comparison.ranks)
            faults += configuration_faults(self.folder, adapter_config(self.plan, ranks))
            expected = adapter_record(self.plan, self.device, ranks, comparison.losses, self._inputs)
            faults += record_faults(self.record, expected)
            if not is_same_base(self.record.base, expected.base):
                faults.append(
                    Fault("record", "base", f"is {self.record.base}, but the experts' base is {expected.base}")
                )
        return compared, [*input_faults(self.record, self.library, self.digests.results()), *faults]

    def model(self, base: Path | str | None, progress: Progress | None) -> tuple[Comparison | None, list[Fault]]:
        """Compare the tensors, all other files and the record of a merged model."""
        model = _base_of(self.record, base)
        for shard in model.checkpoint.shards.values():
            self.digests.add(shard.path)
        bank = ExpertBank([self.library[expert.name] for expert in self.plan.experts], device=self.device)
        soups = Soups([self.plan], bank)
        changes = Changes.of(soups, model)
        soups.prepare()
        compared = compare_model(self.folder, changes, progress)
        expected = model_record(self.plan, changes, self._inputs, self.digests.results(), self.folder)
        return compared, [
            *input_faults(self.record, self.library, self.digests.results()),
            *fingerprint_faults(self.record, model.fingerprint, str(model.folder)),
            *digest_faults("base", str(model.folder), self.record.base_blake3, expected.base_blake3),
            *other_file_faults(self.folder, self.record, changes),
            *record_faults(self.record, expected),
        ]

    @property
    def _inputs(self) -> tuple[InputRecord, ...]:
        return input_records(self.plan, self.library, self.digests.results())


def _record_of(folder: Path) -> SoupRecord:
    if not os.path.isdir(folder):  # noqa: PTH112 # Path.is_dir() raises where the name is too long
        raise InputError("the folder does not exist", where=str(folder), mend="check the spelling of the path")
    record = read_soup_record(folder)
    if record is None:
        raise InputError(
            f"the folder has no {SOUP_FILE}, the file that records how a soup was merged",
            where=str(folder),
            mend="give a folder that `psoups merge` or `psoups merge-many` wrote",
        )
    return record


def _library(record: SoupRecord, given: Path | str | Sequence[Path | str] | None) -> ExpertLibrary:
    """Return the record's experts under their recorded names. The names seed the streams of random methods.

    Raises:
        InputError: if experts are missing. The error names all missing experts.
    """
    roots = [given] if isinstance(given, Path | str) else given
    moved = ExpertLibrary.open(*roots) if roots else {}
    folders = {
        expert.name: moved[expert.name].folder if expert.name in moved else Path(expert.folder)
        for expert in record.experts
    }
    missing = [f"{name} ({folder})" for name, folder in folders.items() if not os.path.isdir(folder)]  # noqa: PTH112
    if missing:
        raise InputError(
            "experts of this soup are missing from their recorded folders: " + ", ".join(missing),
            where=SOUP_FILE,
            mend="give the folder that contains these experts now: experts=FOLDER",
        )
    return ExpertLibrary(folders, where=SOUP_FILE)


def _given_method(record: SoupRecord, method: str | Method | DenseMerge | None) -> Method | str | None:
    """Return the method with which to repeat the merge.

    If the record's method is built-in, return its name. Otherwise, return the `Method` of `method`, or None if `method`
    is None.

    Raises:
        UsageError: if the record's method is built-in, but `method` is another method.
    """
    given = None if method is None else find_method(method)
    if record.method_source is not None:
        return given
    if given is not None and given.name != record.method:
        raise UsageError(
            f"the soup was merged by {record.method}, a built-in method, but the method given is {given.name}",
            where="method",
            mend="leave out the argument `method`",
        )
    return record.method


def _on_of(record: SoupRecord, given: Path | str | None) -> Path | str | None:
    """Return the folder of the base adapter that the soup includes, or None if it includes none.

    Raises:
        InputError: if the folder does not exist.
        UsageError: if an adapter is given, but the soup includes none.
    """
    if record.on_folder is None:
        if given is not None:
            raise UsageError(
                "the soup includes no base adapter, but one is given", where="on", mend=f"leave out on={given}"
            )
        return None
    folder = record.on_folder if given is None else given
    if not os.path.isdir(folder):  # noqa: PTH112 # Path.is_dir() raises if the name is too long
        raise InputError(
            "the adapter on top of which the experts were trained is missing from its recorded folder",
            where=str(folder),
            mend="give the folder that contains this adapter now: on=FOLDER",
        )
    return folder


def _plan(
    record: SoupRecord,
    library: ExpertLibrary,
    base: Path | str | None,
    on: Path | str | None,
    method: Method | str,
) -> MergePlan:
    """Plan the merge again. The experts are in the order of the record, which is their order in stacked factors.

    The experts' bases are not compared with each other, because the digests of the files show whether the inputs have
    changed.
    """
    # the profile may name a method of a package that is not installed here, so `method` replaces it
    own = {} if record.method_source is None else {"method": "linear", "options": {}}
    profile = load_data({**record.profile, **own}, Profile, SOUP_FILE)
    weights = {name: weight for name, weight in profile.weights.items() if weight != 0}
    if set(weights) != set(library):
        raise DeclarationError(
            f"the profile has weights for {', '.join(sorted(weights))}, but the merge read {', '.join(library)}",
            where=f"{SOUP_FILE}: profile.weights",
            mend="restore the original soup.json, or merge the experts again",
        )
    ordered = {expert.name: weights[expert.name] for expert in record.experts}
    cut = record.truncation
    return plan_merge(
        library,
        # the record contains the rank of the merge, which may come from an option instead of the profile
        profile.replaced(weights=ordered, rank=None, allow_opposed=True),
        MergeOptions(
            method=method,
            method_options=record.options,
            rank=record.rank if cut is not None and cut.energy is None else None,
            energy=None if cut is None else cut.energy,
            dtype=record.dtype if record.kind == "adapter" else None,
            target=record.target,
            same_base=True,
            base=None if record.base_folder is None else _base_of(record, base).folder,
            on=on,
        ),
        into_base=record.kind == "model",
    )


def _base_of(record: SoupRecord, given: Path | str | None) -> BaseModel:
    name = given if given is not None else record.base_folder or record.base.name
    if name is None:
        raise InputError(
            "soup.json does not name the base", where=SOUP_FILE, mend="give the folder or hub id of the base: base=BASE"
        )
    try:
        return BaseModel.open(name)
    except InputError as error:
        if given is not None:
            raise
        raise type(error)(
            error.what, where=error.where, mend="give the folder that contains the base now: base=BASE"
        ) from error
