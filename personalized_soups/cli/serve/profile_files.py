"""`psoups profile import` and `psoups profile export`: read and write JSON Lines files of profiles."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TextIO

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import JsonOption, StoreOption
from personalized_soups.cli.serve.stored_profiles import DEFAULT_STORE, CheckedExpertsOption, fields_of, opened_store
from personalized_soups.errors import InputError, OutputExistsError, SoupError


def import_profiles(
    file: Annotated[Path, typer.Argument(help="JSON Lines file of profiles. Each line names its user.")],
    *,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip invalid lines and print their errors, but write the valid lines.")
    ] = False,
    profiles: StoreOption = DEFAULT_STORE,
    experts: CheckedExpertsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write all profiles of a file to the store.

    If a line is invalid, nothing is written unless you give --skip-bad. Profiles that are already in the store are not
    written again.
    """
    from personalized_soups.declare.profiles import read_profiles

    with opened_store(profiles, experts, create=True) as store, render.progress("importing", quiet=as_json) as bar:
        report = _ImportReport(bar)
        on_bad = report.skip if skip_bad else None
        report.written = store.put_many(read_profiles(file, on_bad=on_bad), on_done=report.advance, on_bad=on_bad)
    report.check(file)
    report.show(with_skipped=skip_bad, as_json=as_json)


def export_profiles(
    *,
    out: Annotated[
        Path | None, typer.Option(help="New file to write instead of standard output.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    profiles: StoreOption = DEFAULT_STORE,
) -> None:
    """Print the current profiles as JSON Lines, sorted by user. psoups profile import reads this format."""
    with opened_store(profiles) as store:
        if out is None:
            for stored in store.all():
                render.show_line(fields_of(stored.profile))
            return
        count = 0
        with _new_file(out, overwrite=overwrite) as lines:
            for stored in store.all():
                lines.write(json.dumps(fields_of(stored.profile), ensure_ascii=False) + "\n")
                count += 1
    render.say(f"{count} profiles in {out}")


@dataclass
class _ImportReport:
    """The counts of an import, and the errors of skipped lines."""

    bar: render.Bar
    num_valid: int = 0
    written: int = 0
    skipped: list[SoupError] = field(default_factory=list)

    def advance(self, num_valid: int) -> None:
        """Set the number of valid profiles and advance the progress bar."""
        self.num_valid = num_valid
        self.bar.update(num_valid)

    def skip(self, error: SoupError) -> None:
        """Record and print the error of a skipped line."""
        self.skipped.append(error)
        render.say(" ".join(f"skipped {error.where}: {error.what}; {error.mend}".split()))

    def check(self, file: Path) -> None:
        """Raise InputError if lines were skipped and no line is valid.

        Raises:
            InputError: if `file` has invalid lines and no valid line.
        """
        if self.skipped and not self.num_valid:
            raise InputError(
                f"the file has no valid profile, but {len(self.skipped)} invalid lines",
                where=str(file),
                mend="fix the lines whose errors are printed above",
            )

    def show(self, *, with_skipped: bool, as_json: bool) -> None:
        """Print the counts. With both flags, the JSON also contains the errors of the skipped lines."""
        there = "there_already" if as_json else "there already"
        record: dict[str, object] = {
            "profiles": self.num_valid,
            "written": self.written,
            there: self.num_valid - self.written,
        }
        errors = [{"where": error.where, "what": error.what, "mend": error.mend} for error in self.skipped]
        if with_skipped:
            record["skipped"] = errors if as_json else len(errors)
        render.show_record(record, as_json=as_json)


@contextmanager
def _new_file(path: Path, *, overwrite: bool) -> Iterator[TextIO]:
    """Yield a temporary file that becomes `path` when the block ends. After an error, `path` is not written."""
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        raise OutputExistsError(
            "the output path already exists",
            where=str(path),
            mend="give --out a new file, e.g. --out users.jsonl, or give --overwrite to replace an existing file",
        )
    from personalized_soups.files.atomic import new_file

    with new_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        yield file
