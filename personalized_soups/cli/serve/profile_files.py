"""`psoups profile import` and `psoups profile export`: read and write JSON Lines files of profiles."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from personalized_soups.cli import render
from personalized_soups.cli.arguments import Option, name_options
from personalized_soups.cli.options import JsonOption, StoreOption
from personalized_soups.cli.serve.stored_profiles import (
    DEFAULT_STORE,
    CheckedExpertsOption,
    counted,
    fields_of,
    opened_store,
)
from personalized_soups.errors import InputError, OutputExistsError, SoupError

if TYPE_CHECKING:
    from personalized_soups.users.profiles.imports import Imported
    from personalized_soups.users.profiles.store import ProfileStore


def import_profiles(
    file: Annotated[Path, typer.Argument(help="JSON Lines file of profiles. Each line names its user.")],
    *,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip invalid lines and print their errors, but write the valid lines.")
    ] = False,
    replace_answers: Annotated[
        bool,
        typer.Option("--replace-answers", help="Replace stored answers if the file has other ones to the questions."),
    ] = False,
    profiles: StoreOption = DEFAULT_STORE,
    experts: CheckedExpertsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write all profiles, and all answers to questions, of a file to the store.

    If a line is invalid, nothing is written unless you give --skip-bad. Profiles and answers that are already in the
    store are not written again.
    """
    from personalized_soups.declare.profiles import read_user_lines

    with opened_store(profiles, experts, create=True) as store, render.progress("importing", quiet=as_json) as bar:
        report = _ImportReport(bar)
        on_bad = report.skip if skip_bad else None
        report.imported = store.put_lines(
            read_user_lines(file, on_bad=on_bad),
            replace_answers=replace_answers,
            on_done=report.advance,
            on_bad=on_bad,
        )
    report.check(file)
    report.show(with_skipped=skip_bad, as_json=as_json)


def export_profiles(
    *,
    out: Annotated[
        Path | None, typer.Option(help="New file to write instead of standard output.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    with_answers: Annotated[
        bool,
        typer.Option("--with-answers", help="Add a line with the answers to questions for each user who has answers."),
    ] = False,
    profiles: StoreOption = DEFAULT_STORE,
) -> None:
    """Print the current profiles as JSON Lines, sorted by user. psoups profile import reads this format."""
    counts = Counter[str]()
    with opened_store(profiles) as store:
        if out is None:
            for line in _exported(store, counts, with_answers=with_answers):
                render.show_line(line)
            return
        with _new_file(out, overwrite=overwrite) as lines:
            for line in _exported(store, counts, with_answers=with_answers):
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    answers = f" and the answers of {counted(counts['answers'], 'user')}" if with_answers else ""
    render.say(f"{counted(counts['profiles'], 'profile')}{answers} in {out}")


def _exported(store: ProfileStore, counts: Counter[str], *, with_answers: bool) -> Iterator[dict[str, Any]]:
    """Yield the lines of an export, first the profiles and then the answers, and count both kinds in `counts`."""
    for stored in store.all():
        counts["profiles"] += 1
        yield fields_of(stored.profile)
    if with_answers:
        for user in store.answers.users():
            answers = store.answers.of(user)
            if answers:  # else they were deleted in the meantime
                counts["answers"] += 1
                yield {
                    "user": user,
                    "answers": [answered.model_dump(mode="json", exclude_defaults=True) for answered in answers],
                }


@dataclass
class _ImportReport:
    """The counts of an import, and the errors of skipped lines."""

    bar: render.Bar
    num_valid: int = 0
    imported: Imported | None = None
    skipped: list[SoupError] = field(default_factory=list)

    def advance(self, num_valid: int) -> None:
        """Set the number of valid lines and advance the progress bar."""
        self.num_valid = num_valid
        self.bar.update(num_valid)

    def skip(self, error: SoupError) -> None:
        """Record and print the error of a skipped line."""
        name_options(error, {"replace_answers": Option("--replace-answers", takes_value=False)})
        self.skipped.append(error)
        render.say(" ".join(f"skipped {error.where}: {error.what}; {error.mend}".split()))

    def check(self, file: Path) -> None:
        """Raise InputError if lines were skipped and no line is valid.

        Raises:
            InputError: if `file` has invalid lines and no valid line.
        """
        if self.skipped and not self.num_valid:
            raise InputError(
                f"the file has no valid line, but {len(self.skipped)} invalid lines",
                where=str(file),
                mend="fix the lines whose errors are printed above",
            )

    def show(self, *, with_skipped: bool, as_json: bool) -> None:
        """Print the counts. With both flags, the JSON also contains the errors of the skipped lines."""
        assert self.imported is not None
        there = "there_already" if as_json else "there already"
        record: dict[str, object] = {
            "profiles": self.imported.num_profiles,
            "written": self.imported.num_versions,
            there: self.imported.num_profiles - self.imported.num_versions,
        }
        if self.imported.num_given:
            record["answers"] = self.imported.num_given
            record["answers_written" if as_json else "answers written"] = self.imported.num_answers
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
