"""Check and convert the options of `psoups merge` and `psoups merge-many`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli.bases import resolve_base
from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from personalized_soups.files.copies import CopyMode


def checked_experts(experts: list[Path] | None) -> list[Path]:
    """Return the folders of experts.

    Raises:
        UsageError: if no folder is given.
    """
    if not experts:
        raise UsageError(
            "no folder of experts is given", where="--experts", mend="give a folder, e.g. --experts quickstart/experts"
        )
    return experts


def check_one_base(base: str | None, into_base: str | None) -> None:
    """Raise if the options ask for an adapter and for a full model.

    Raises:
        UsageError: naming both options.
    """
    if base is not None and into_base is not None:
        raise UsageError(
            "--base and --into-base are both given, but --base writes an adapter and --into-base writes a full model",
            where="--base, --into-base",
            mend="remove --into-base to write an adapter, or remove --base to write a full model",
        )


def given_options(**values: float | None) -> dict[str, float]:
    """Return the method options that are given, by name (`lambda_` is `lambda`)."""
    return {name.rstrip("_"): value for name, value in values.items() if value is not None}


def resolved(base: str | None) -> str | None:
    """Return the folder or model id of a base, or None where no base is given."""
    return None if base is None else resolve_base(base)


def checked_copy_mode(name: str) -> CopyMode:
    """Return the copy mode of that name.

    Raises:
        UsageError: if no copy mode has the name.
    """
    modes: Mapping[str, CopyMode] = {"copy": "copy", "reflink": "reflink", "link": "link"}
    if name not in modes:
        raise UsageError(f"unknown copy mode {name!r}", where="--untouched", mend=choose_from(name, modes))
    return modes[name]
