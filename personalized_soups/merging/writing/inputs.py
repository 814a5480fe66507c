"""Record the inputs of a merge in soup.json, and check that the output folder does not overlap an input folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import InputRecord
from personalized_soups.errors import UsageError
from personalized_soups.merging.planning.plan import MergePlan


def input_records(plan: MergePlan, library: ExpertLibrary, digests: Mapping[Path, str]) -> tuple[InputRecord, ...]:
    """Return the records of the plan's experts for soup.json.

    Args:
        plan: the plan of the merge.
        library: the experts.
        digests: the BLAKE3 digest of every file of the experts, by the file's path.
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
    """Check that writing the output folder cannot destroy an input folder.

    Raises:
        UsageError: if the output folder is an input folder, is inside an input folder, or contains an input folder.
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
