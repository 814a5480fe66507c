"""The soups of many users in one pass: profiles over the same experts are merged together, a batch at a time.

U users, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import InputRecord, SoupRecord, read_soup_record
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.profiles import each_once
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import DeclarationError, OutputExistsError, SoupError, UsageError
from personalized_soups.files.atomic import check_target, new_folder
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.launching.threads import in_order, num_workers
from personalized_soups.merging.computing.module_soups import ModuleSoup
from personalized_soups.merging.computing.whole_tensors import on_base
from personalized_soups.merging.planning.checks import raise_all, unmet_needs
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import (
    MergePlan,
    PlannedExpert,
    arithmetic_device,
    plan_merge,
    resolve_device,
)
from personalized_soups.merging.writing.adapter import check_output_apart, input_records
from personalized_soups.merging.writing.adapter_writer import AdapterWriter, MergedModule, told_whose
from personalized_soups.merging.writing.into_base import fold_plans
from personalized_soups.merging.writing.one_basis import ProductWriter, is_plain_product

Progress = Callable[[int], None]

# Bytes of one module's soups of all users of a batch; a few modules are in work at once.
_BATCH_BYTES = 32 << 20
_MOST_USERS = 64
# A batch that is folded has as many model files open, and their terms of one module in memory.
_MOST_MODELS = 16
# Profiles that wait until enough of them are over the same experts, and choices of experts that are remembered.
_MOST_WAITING = 1024
_MOST_PATTERNS = 64

_MAX_NAME_BYTES = 200


@dataclass(frozen=True, slots=True)
class Merged:
    """How many users' soups were written, and how many were there already."""

    written: int
    kept: int


class ManyPlans:
    """Plans for many profiles. Decisions that depend on the experts alone are made once for each set of experts.

    Args:
        library: the experts.
        options: the choices that override the profiles'; the defaults if left out.
        into_base: plan to fold the soups into a base model.
    """

    def __init__(self, library: ExpertLibrary, options: MergeOptions | None = None, *, into_base: bool = False) -> None:
        self.library = library
        self._options = options
        self._into_base = into_base
        self._known: dict[object, _Pattern] = {}

    def plan(self, profile: Profile) -> tuple[object, MergePlan]:
        """Return a key, equal for plans that can be merged together, and the profile's plan.

        Raises:
            DeclarationError: if the user's name cannot be that of a folder.
            SoupError: everything that plan_merge raises.
        """
        _check_user(profile)
        weights = {name: weight for name, weight in profile.resolved_weights().items() if weight != 0}
        key = (frozenset(weights), profile.method, profile.rank, frozenset(profile.options.items()))
        try:
            if key not in self._known:
                if len(self._known) >= _MOST_PATTERNS:
                    self._known.clear()
                plan = plan_merge(self.library, profile, self._options, into_base=self._into_base)
                self._known[key] = _Pattern.of(plan, self.library)
            return key, self._known[key].filled(self.library, profile, weights)
        except UsageError as fault:  # of the command, or of this one line
            where = f"{fault.where} ({profile.place('user')})"
            raise UsageError(f"{profile.user!r}: {fault.what}", where=where, mend=fault.mend) from None


@dataclass(frozen=True, eq=False, slots=True)
class _Pattern:
    """A plan over some experts, to be filled with anybody's weights over them."""

    plan: MergePlan
    bank: ExpertBank
    sides: SideRule

    @classmethod
    def of(cls, plan: MergePlan, library: ExpertLibrary) -> _Pattern:
        experts = [library[expert.name] for expert in plan.experts]
        return cls(plan, ExpertBank(experts), SideRule.of(experts))

    def filled(self, library: ExpertLibrary, profile: Profile, weights: Mapping[str, float]) -> MergePlan:
        library.check(profile)
        self.sides.check(profile)
        experts = tuple(PlannedExpert(each.name, each.folder, weights[each.name]) for each in self.plan.experts)
        if self.plan.method.divides_by_sum:
            raise_all(unmet_needs(self.plan.method, self.bank, [each.weight for each in experts]))
        return replace(self.plan, profile=profile, experts=experts)


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
    """Write the soup of every profile into `out/USER`: adapters, or full models with `into_base`.

    Profiles over the same experts are merged in batches: a batch reads the experts once, and work that does not depend
    on the weights is done once. If all experts share their basis, one product gives every user's factors. Users whose
    soup exists already are skipped, so an interrupted run resumes when it is started again. Memory: one batch's soups
    of the few modules in use, regardless of the number of profiles.

    Args:
        library: the experts.
        profiles: one profile for each user; the field `user` names the user's folder.
        out: the folder that holds the users' folders; it may exist.
        options: the choices that override the profiles'; the defaults if left out.
        into_base: fold every soup into this base model, which is read once for each batch.
        overwrite: replace folders that hold another soup.
        progress: called from time to time with the number of users that are done.

    Raises:
        SoupError: all errors of merge and merge_into_base; OutputExistsError if a user's folder holds another soup, or
            two profiles name the same user.
    """
    options = options or MergeOptions()
    plans = ManyPlans(library, options, into_base=into_base is not None)
    device = resolve_device(options.device)  # before any work, so that a wrong name is reported at once
    folder = Path(out)
    model = None if into_base is None else BaseModel.open(into_base).fingerprint
    kept = written = 0
    with BackgroundDigests() as digests:
        for batch in _batches(plans, each_once(profiles), into_base=into_base is not None):
            left = [
                plan for plan in batch if not _is_there(library, plan, folder, digests, base=model, overwrite=overwrite)
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
    """Yield plans that are merged together; few profiles wait for others of their kind."""
    waiting: dict[object, list[MergePlan]] = {}
    num_waiting = 0
    for profile in profiles:
        key, plan = plans.plan(profile)
        own = waiting.setdefault(key, [])
        own.append(plan)
        num_waiting += 1
        if len(own) >= _most_users(plan, into_base=into_base):
            num_waiting -= len(own)
            yield waiting.pop(key)
        elif num_waiting >= _MOST_WAITING:
            key = max(waiting, key=lambda each: len(waiting[each]))
            num_waiting -= len(waiting[key])
            yield waiting.pop(key)
    yield from waiting.values()


def _most_users(plan: MergePlan, *, into_base: bool) -> int:
    numbers = max(
        module.rank * module.like.blocks * (module.in_features + module.out_features) for module in plan.modules
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
    experts = [library[expert.name] for expert in plans[0].experts]
    soups, whole = on_base(plans, ExpertBank(experts, device=device))
    with ExitStack() as stack:
        writers = []
        for number, plan in enumerate(plans):
            out = folder / plan.profile.user
            check_output_apart(out, plan.input_folders)
            scratch = stack.enter_context(new_folder(out, overwrite))
            writers.append(stack.enter_context(AdapterWriter(scratch, plan, whole[number] if whole else None)))

        def put(each: Sequence[ModuleSoup]) -> None:
            for writer, plan, soup in zip(writers, plans, each, strict=True):
                with told_whose(plan):
                    writer.put(MergedModule.of(soup, plan))

        if is_plain_product(soups):
            written = in_order(ProductWriter(soups, writers).write, soups.plan.modules, num_workers(device))
        else:
            written = soups.each(put)
        for _ in written:
            pass
        for writer, plan in zip(writers, plans, strict=True):
            writer.finish(device, input_records(plan, library, digests.results()))


def _is_there(
    library: ExpertLibrary,
    plan: MergePlan,
    folder: Path,
    digests: BackgroundDigests,
    *,
    base: str | None,
    overwrite: bool,
) -> bool:
    """Return whether a user's folder holds this very soup, by its record; a folder of another is refused.

    `base` is the fingerprint of the model that the soup is folded into.

    Raises:
        OutputExistsError: if the folder is there with another soup and shall not be replaced.
    """
    for expert in plan.experts:
        for path in library[expert.name].adapter.files:
            digests.add(path)
    out = folder / plan.profile.user
    if not out.is_dir():
        return False
    try:
        record = read_soup_record(out)
    except SoupError:
        record = None
    if record is not None and _tells_of(record, plan, input_records(plan, library, digests.results()), base):
        with suppress(OutputExistsError):  # another run is at its end there
            check_target(out, overwrite=True)
        return True
    if not overwrite:
        raise OutputExistsError(
            f"the folder of {plan.profile.user!r} is there already, with another soup",
            where=str(out),
            mend="choose another output folder, or pass overwrite=True",
        )
    return False


def _tells_of(record: SoupRecord, plan: MergePlan, inputs: tuple[InputRecord, ...], base: str | None) -> bool:
    wanted = (
        base or plan.base.fingerprint,
        "model" if plan.encoding == "folded" else "adapter",
        plan.method.name,
        plan.method_source,
        dict(plan.options),
        plan.encoding,
        plan.target,
        plan.energy,
        plan.profile.model_dump(mode="json"),
        inputs,
    )
    told = (
        record.base.fingerprint,
        record.kind,
        record.method,
        record.method_source,
        record.options,
        record.encoding,
        record.target,
        None if record.truncation is None else record.truncation.energy,
        record.profile,
        record.experts,
    )
    if wanted != told or plan.encoding == "folded":  # a folded model keeps its base's dtypes and has no rank
        return wanted == told
    return record.dtype == plan.dtype and (plan.energy is not None or record.rank == plan.rank)


def _check_user(profile: Profile) -> None:
    """Raise if a user's name cannot be that of a folder of their own.

    Raises:
        DeclarationError: naming the line.
    """
    name = profile.user
    is_plain = not set(name) & set("/\\") and name.isprintable() and not name.startswith(".")
    if (
        not is_plain
        or len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES
        or "user" not in profile.model_fields_set
    ):
        raise DeclarationError(
            f"the user {name[:80]!r} cannot be the name of a folder"
            if "user" in profile.model_fields_set
            else "the profile names no user",
            where=profile.place("user"),
            mend="write `user: u1042`: letters, digits and signs but slashes, not beginning with a dot, at most "
            f"{_MAX_NAME_BYTES} bytes",
        )
