"""The inputs of a merge: their records in soup.json, and the check that no output overlaps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import InputRecord
from personalized_soups.errors import UsageError
from personalized_soups.merging.planning.plan import MergePlan


def input_records(plan: MergePlan, library: ExpertLibrary, digests: Mapping[Path, str]) -> tuple[InputRecord, ...]:
    """Return the records of the plan's experts in soup.json.

    Args:
        plan: the plan of the merge.
        library: the experts.
        digests: the BLAKE3 digest of each of the experts' files.
    """
    return tuple(
        InputRecord(
            name=expert.name,
            folder=expert.folder,
            weight=expert.weight,
            blake3={path.name: digests[path] for path in library[expert.name].adapter.files},
        )
        for expert in plan.experts
    )


def check_output_apart(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Raise if an output folder is an input folder, or inside or around one: writing would destroy the input.

    Raises:
        UsageError: with the input's folder.
    """
    output = folder.resolve()
    for name in inputs:
        source = Path(name).resolve()
        if output == source or source in output.parents or output in source.parents:
            raise UsageError(
                f"the output folder overlaps the input folder {source}, so writing could destroy the input",
                where=str(folder),
                mend="choose an output folder outside the input folder",
            )
