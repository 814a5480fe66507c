"""Merge the profiles of many users. Profiles with the same experts are merged together in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.profiles import each_once
from personalized_soups.devices import MERGE_DEVICES, resolve_device
from personalized_soups.files.atomic import new_folder
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.launching.threads import in_order, num_workers
from personalized_soups.merging.computing.merged_modules import MergedModule
from personalized_soups.merging.computing.module_soups import ModuleSoup
from personalized_soups.merging.computing.one_basis import is_plain_product
from personalized_soups.merging.computing.whole_tensors import on_base
from personalized_soups.merging.planning.checks import naming_user
from personalized_soups.merging.planning.many_plans import ManyPlans
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan, arithmetic_device
from personalized_soups.merging.writing.adapter_writer import AdapterWriter
from personalized_soups.merging.writing.finished import is_finished
from personalized_soups.merging.writing.inputs import check_output_apart, input_records
from personalized_soups.merging.writing.into_base import fold_plans
from personalized_soups.merging.writing.one_basis import OneBasisWriter

Progress = Callable[[int], None]

# The maximum size in bytes of one module's soups in a batch. The threads hold a few modules at once.
_BATCH_BYTES = 32 << 20
_MOST_USERS = 64
# For a batch of folded models, this many files are open at once, and their terms of a tensor are in memory.
_MOST_MODELS = 16
# The maximum number of profiles that wait in memory until their batch is full.
_MOST_WAITING = 1024


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of merge_many.

    Attributes:
        written: the number of users whose soups were written.
        kept: the number of users whose soups existed already.
    """

    written: int
    kept: int


def merge_many(
    library: ExpertLibrary,
    profiles: Iterable[Profile],
    out: Path | str,
    options: MergeOptions | None = None,
    *,
    into_base: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write the soup of every profile to the folder `out/USER`: an adapter, or a full model if `into_base` is given.

    Profiles with the same experts are merged in batches. For each batch the experts are read once, and work that does
    not depend on the weights is done once. If all experts share their A's, one matrix product gives the B's of all
    users. Users whose soup is already written are skipped, so an interrupted run can be started again and continues.
    In memory are the soups of one batch for a few modules, regardless of the number of profiles.

    Args:
        library: the experts.
        profiles: one profile for each user. The field `user` is the name of the user's folder.
        out: the folder that holds the users' folders. It may exist.
        options: the choices that override those of the profiles. The default is `MergeOptions()`.
        into_base: fold every soup into this base model. The base is read once for each batch.
        overwrite: replace a user's folder if it holds another soup.
        progress: a function that is called after each batch with the number of users that are done.

    Raises:
        OutputExistsError: if the folder of a user holds another soup and `overwrite` is false.
        SoupError: all errors of `merge` and `merge_into_base`. Also if two profiles have the same user.

    Example:
        >>> library = ExpertLibrary.open("experts")
        >>> users = [Profile(user=user, weights={"friendly": 0.6}) for user in ("ada", "ben")]
        >>> merged = merge_many(library, users, "soups")
    """
    options = options or MergeOptions()
    plans = ManyPlans(library, options, into_base=into_base is not None)
    device = resolve_device(
        options.device, kinds=MERGE_DEVICES
    )  # resolved first, so that a wrong device name does not stop the run after hours
    folder = Path(out)
    model = None if into_base is None else BaseModel.open(into_base).fingerprint
    kept = written = 0
    with BackgroundDigests() as digests:
        for batch in _batches(plans, each_once(profiles), into_base=into_base is not None):
            left = [
                plan
                for plan in batch
                if not is_finished(library, plan, folder, digests, base=model, overwrite=overwrite)
            ]
            kept += len(batch) - len(left)
            if left and into_base is None:
                computed_on = arithmetic_device(left[0], options.device)
                _write_adapters(library, left, folder, computed_on, digests, overwrite=overwrite)
            elif left:
                fold_plans(
                    library,
                    left,
                    [folder / plan.profile.user for plan in left],
                    into_base or "",
                    device=device,
                    same_base=options.same_base,
                    overwrite=overwrite,
                )
            written += len(left)
            if progress is not None:
                progress(written + kept)
    return Merged(written, kept)


def _batches(plans: ManyPlans, profiles: Iterable[Profile], *, into_base: bool) -> Iterator[list[MergePlan]]:
    """Yield batches of plans that have the same experts. At most `_MOST_WAITING` plans wait until a batch is full."""
    waiting: dict[object, list[MergePlan]] = {}
    num_waiting = 0
    for profile in profiles:
        key, plan = plans.plan(profile)
        batch = waiting.setdefault(key, [])
        batch.append(plan)
        num_waiting += 1
        if len(batch) >= _most_users(plan, into_base=into_base):
            num_waiting -= len(batch)
            yield waiting.pop(key)
        elif num_waiting >= _MOST_WAITING:
            key = max(waiting, key=lambda other: len(waiting[other]))
            num_waiting -= len(waiting[key])
            yield waiting.pop(key)
    yield from waiting.values()


def _most_users(plan: MergePlan, *, into_base: bool) -> int:
    """Return the maximum number of users in a batch, so that the batch's soups of a module fit into `_BATCH_BYTES`."""
    numbers = max(
        module.written_rank * module.like.blocks * (module.in_features + module.out_features) for module in plan.modules
    )
    return max(1, min(_MOST_MODELS if into_base else _MOST_USERS, _BATCH_BYTES // (4 * numbers)))


def _write_adapters(
    library: ExpertLibrary,
    plans: Sequence[MergePlan],
    folder: Path,
    device: torch.device,
    digests: BackgroundDigests,
    *,
    overwrite: bool,
) -> None:
    """Write the adapters of one batch of users. All plans have the same experts."""
    experts = [library[expert.name] for expert in plans[0].experts]
    soups, whole = on_base(plans, ExpertBank(experts, device=device))
    with ExitStack() as stack:
        writers = []
        for number, plan in enumerate(plans):
            out = folder / plan.profile.user
            check_output_apart(out, plan.input_folders)
            scratch = stack.enter_context(new_folder(out, overwrite))
            writers.append(stack.enter_context(AdapterWriter(scratch, plan, whole[number] if whole else None)))

        def put(users_soups: Sequence[ModuleSoup]) -> None:
            for writer, plan, soup in zip(writers, plans, users_soups, strict=True):
                with naming_user(plan):
                    writer.put(MergedModule.of(soup, plan))

        if is_plain_product(soups):
            written = in_order(OneBasisWriter(soups, writers).write, soups.plan.modules, num_workers(device))
        else:
            written = soups.each(put)
        for _ in written:
            pass
        for writer, plan in zip(writers, plans, strict=True):
            writer.finish(device, input_records(plan, library, digests.results()))
