"""Check and convert the options of `psoups merge` and `psoups merge-many`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli.bases import resolve_base
from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from personalized_soups.adapters.provenance import SoupRecord
    from personalized_soups.files.copies import CopyMode


def checked_experts(experts: list[Path] | None) -> list[Path]:
    """Check that at least one folder of experts is given, and return the folders.

    Raises:
        UsageError: if no folder is given.
    """
    if not experts:
        raise UsageError(
            "no folder of experts is given", where="--experts", mend="give a folder, e.g. --experts quickstart/experts"
        )
    return experts


def check_one_base(base: str | None, into_base: str | None) -> None:
    """Raise UsageError if --base and --into-base are both given.

    Raises:
        UsageError: if both options are given.
    """
    if base is not None and into_base is not None:
        raise UsageError(
            "--base and --into-base are both given, but --base writes an adapter and --into-base writes a full model",
            where="--base, --into-base",
            mend="remove --into-base to write an adapter, or remove --base to write a full model",
        )


def given_options(**values: float | None) -> dict[str, float]:
    """Return the values that are not None, by name without a final `_` (`lambda_` becomes `lambda`)."""
    return {name.rstrip("_"): value for name, value in values.items() if value is not None}


def resolved(base: str | None) -> str | None:
    """Return the folder or model id of the base, or None if `base` is None."""
    return None if base is None else resolve_base(base)


def adapter_facts(record: SoupRecord) -> dict[str, str]:
    """Return a line about the adapter on top of which the experts were trained, or an empty dict if there is none."""
    if record.on is None:
        return {}
    if record.on_folder is not None:
        return {"on top of": f"{record.on.name}, included once: load the soup on the base alone"}
    return {"on top of": f"{record.on.name}, not included: load the soup with --on, on top of this adapter"}


def checked_copy_mode(name: str) -> CopyMode:
    """Check the value of `--untouched` and return it.

    Raises:
        UsageError: if the copy mode is unknown.
    """
    modes: Mapping[str, CopyMode] = {"copy": "copy", "reflink": "reflink", "link": "link"}
    if name not in modes:
        raise UsageError(f"unknown copy mode {name!r}", where="--untouched", mend=choose_from(name, modes))
    return modes[name]
