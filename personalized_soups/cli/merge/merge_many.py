"""`psoups merge-many`: merge the experts of a library for every user of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.merge.request import check_one_base, checked_experts, given_options, resolved
from personalized_soups.cli.options import (
    DensityOption,
    EnergyOption,
    EpsilonOption,
    JsonOption,
    LambdaOption,
    MergeBaseOption,
    MergeDeviceOption,
    MergeDtypeOption,
    MergeExpertsOption,
    MergeOnOption,
    MethodOption,
    MethodSeedOption,
    RankOption,
    SameBaseOption,
    TargetOption,
)
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.merging.planning.options import MergeOptions
    from personalized_soups.merging.writing.many import Merged


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="merge-many")(merge_many)


def merge_many(
    profiles: Annotated[Path, typer.Argument(help="JSON Lines file of profiles. Each line names its user.")],
    *,
    experts: MergeExpertsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder. The soup of each user is written to OUT/USER.", show_default=False),
    ] = None,
    method: MethodOption = None,
    density: DensityOption = None,
    epsilon: EpsilonOption = None,
    lambda_: LambdaOption = None,
    seed: MethodSeedOption = None,
    rank: RankOption = None,
    energy: EnergyOption = None,
    target: TargetOption = "peft",
    device: MergeDeviceOption = "auto",
    dtype: MergeDtypeOption = None,
    base: MergeBaseOption = None,
    on: MergeOnOption = None,
    into_base: Annotated[
        str | None, typer.Option(help="Add each soup to the weights of this base model, and write full models.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace users' folders that hold a different soup.")
    ] = False,
    same_base: SameBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge experts for every user of a file, in one pass over the experts.

    Run the same command again to resume an interrupted run.
    """
    folders = checked_experts(experts)
    check_one_base(base, into_base)
    _check_readable_twice(profiles)
    if out is None:
        raise UsageError("no output folder is given", where="--out", mend="give a folder, e.g. --out soups")
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.merging.planning.options import MergeOptions

    options = MergeOptions(
        method=method,
        method_options=given_options(density=density, epsilon=epsilon, lambda_=lambda_, seed=seed),
        rank=rank,
        energy=energy,
        dtype=dtype,
        target=target,
        device=device,
        same_base=same_base,
        base=resolved(base),
        on=on,
    )
    users = _Users(ExpertLibrary.open(*folders), profiles, options, resolved(into_base))
    _show(users.merge(out, overwrite=overwrite, quiet=as_json), out, as_json=as_json)


def _check_readable_twice(profiles: Path) -> None:
    if not profiles.is_file():
        raise UsageError(
            "the profiles are read twice, so they must be in a regular file, but this path is not a regular file",
            where=str(profiles),
            mend="write the profiles to a file, e.g. users.jsonl"
            if profiles.exists()
            else "give the path of an existing file",
        )


@dataclass(frozen=True, slots=True)
class _Users:
    """A file of profiles, with the experts and options to merge them with."""

    library: ExpertLibrary
    profiles: Path
    options: MergeOptions
    into_base: str | None

    def merge(self, out: Path, *, overwrite: bool, quiet: bool) -> Merged:
        """Check every profile, then merge and write all soups.

        Raises:
            SoupError: if a profile cannot be merged, or a user's folder holds a different soup.
        """
        from personalized_soups.declare.profiles import read_profiles
        from personalized_soups.merging.writing.many import merge_many as merge_all

        total = self._check()
        with render.progress("merging", total, quiet=quiet) as bar:
            return merge_all(
                self.library,
                read_profiles(self.profiles),
                out,
                self.options,
                into_base=self.into_base,
                overwrite=overwrite,
                progress=bar.update,
            )

    def _check(self) -> int:
        """Plan the merge of every profile and return the number of profiles.

        Every line is checked before the first user is merged. Otherwise, a mistake in the last line would stop a run of
        several hours at its end.
        """
        from personalized_soups.declare.profiles import each_once, read_profiles
        from personalized_soups.merging.planning.many_plans import ManyPlans

        plans = ManyPlans(self.library, self.options, into_base=self.into_base is not None)
        total = 0
        for profile in each_once(read_profiles(self.profiles)):
            plans.plan(profile)
            total += 1
        if not total:
            raise UsageError(
                "the file holds no profile",
                where=str(self.profiles),
                mend='write one profile per line, e.g. {"user": "u1042", "weights": {"expert": 0.6}}',
            )
        return total


def _show(merged: Merged, out: Path, *, as_json: bool) -> None:
    kept = "kept" if as_json else "there already"
    counts = {"users": merged.written + merged.kept, "written": merged.written, kept: merged.kept}
    render.show_record({"folder": str(out), **counts}, as_json=as_json)
