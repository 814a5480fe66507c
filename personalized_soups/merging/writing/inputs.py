"""The inputs of a merge: their records in soup.json, and the rule that no output overlaps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import InputRecord
from personalized_soups.errors import UsageError
from personalized_soups.merging.planning.plan import MergePlan


def input_records(plan: MergePlan, library: ExpertLibrary, digests: Mapping[Path, str]) -> tuple[InputRecord, ...]:
    """Return what soup.json says of each expert that took part."""
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
    """Raise if an output folder is an input folder, or inside or around one: writing it would destroy the input.

    Raises:
        UsageError: naming the input.
    """
    output = folder.resolve()
    for name in inputs:
        source = Path(name).resolve()
        if output == source or source in output.parents or output in source.parents:
            raise UsageError(
                f"the output folder overlaps the input {source}", where=str(folder), mend="choose another output folder"
            )
