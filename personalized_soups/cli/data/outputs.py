"""Check the files that the commands of this group write."""

from __future__ import annotations

from pathlib import Path

from personalized_soups.errors import OutputExistsError, UsageError


def check_new_file(out: Path, *, overwrite: bool) -> None:
    """Check that a file can be written.

    Raises:
        OutputExistsError: if `out` is a folder, or exists and `overwrite` is false.
        UsageError: if its folder does not exist.
    """
    if out.is_dir():
        raise OutputExistsError(
            "the output path is a folder, but it must be a file",
            where=str(out),
            mend="give a file, e.g. --out pairs.jsonl",
        )
    if out.exists() and not overwrite:
        raise OutputExistsError(
            "the output file already exists",
            where=str(out),
            mend="choose another name, or give --overwrite to replace the file",
        )
    if not out.absolute().parent.is_dir():
        raise UsageError(
            f"the folder of the output file {out.name!r} does not exist",
            where=str(out.parent),
            mend="create the folder first, e.g. with mkdir -p",
        )
