"""Find users whose soup is already written."""

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
    if record is not None and _matches(record, plan, input_records(plan, library, digests.results()), base):
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


def _matches(record: SoupRecord, plan: MergePlan, inputs: tuple[InputRecord, ...], base: str | None) -> bool:
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
