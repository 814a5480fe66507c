"""Find the users whose soup is already written, so that a second run can skip them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import InputRecord, SoupRecord, read_soup_record
from personalized_soups.errors import OutputExistsError, SoupError
from personalized_soups.files.atomic import check_target
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.merging.planning.plan import MergePlan
from personalized_soups.merging.writing.inputs import input_records


def is_finished(
    library: ExpertLibrary,
    plan: MergePlan,
    folder: Path,
    digests: BackgroundDigests,
    *,
    base: str | None,
    overwrite: bool,
) -> bool:
    """Return whether the folder of the plan's user already holds the soup of exactly this plan, as soup.json records.

    Args:
        library: the experts.
        plan: the user's plan.
        folder: the folder that holds the users' folders.
        digests: computes the digests of the experts' files.
        base: the fingerprint of the base model if the soup is folded into a base, else None.
        overwrite: allow that the folder holds another soup. The result is then False.

    Raises:
        OutputExistsError: if the folder holds another soup and `overwrite` is false.
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
    if record is not None and _matches(record, plan, input_records(plan, library, digests.results()), base):
        # check_target removes the remains of a killed run; it raises if another run is writing this folder
        with suppress(OutputExistsError):
            check_target(out, overwrite=True)
        return True
    if not overwrite:
        raise OutputExistsError(
            f"the folder of the user {plan.profile.user!r} already exists and holds another soup",
            where=str(out),
            mend="choose another output folder, or pass overwrite=True",
        )
    return False


def _matches(record: SoupRecord, plan: MergePlan, inputs: tuple[InputRecord, ...], base: str | None) -> bool:
    """Return whether the record of a written soup agrees with the plan, the experts' files and the base."""
    planned = (
        base or plan.base.fingerprint,
        "model" if plan.encoding == "folded" else "adapter",
        plan.method.name,
        plan.method_source,
        dict(plan.options),
        plan.encoding,
        plan.target,
        plan.energy,
        None if plan.on is None else plan.on.digest,
        plan.on_folder is None,
        plan.profile.model_dump(mode="json"),
        inputs,
    )
    recorded = (
        record.base.fingerprint,
        record.kind,
        record.method,
        record.method_source,
        record.options,
        record.encoding,
        record.target,
        None if record.truncation is None else record.truncation.energy,
        None if record.on is None else record.on.digest,
        record.on_folder is None,
        record.profile,
        record.experts,
    )
    if planned != recorded or plan.encoding == "folded":  # a folded model has no rank and keeps its base's dtypes
        return planned == recorded
    return record.dtype == plan.dtype and (plan.energy is not None or record.rank == plan.rank)
