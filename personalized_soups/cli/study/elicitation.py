"""`psoups study elicitation`: measure on simulated users what a few answers tell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import DeviceOption, RestartOption, WorkersOption
from personalized_soups.cli.study.workers import num_workers
from personalized_soups.errors import UsageError, check_extra, choose_from


def elicitation(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run in this folder is resumed.")] = Path(
        "elicitation"
    ),
    seeds: Annotated[int, typer.Option(help="Number of seeds, each with its own experts and users.", min=1)] = 3,
    users: Annotated[int, typer.Option(help="Number of simulated users of each kind.", min=2)] = 50,
    prompts: Annotated[int, typer.Option(help="Number of held-out prompts that each soup answers.", min=1)] = 4,
    quickstart: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a finished quickstart, whose experts a seed uses. May be repeated, once for each seed. "
            "Experts of other seeds are trained.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="System to compare with: PReF basis, LoRe, VPL or PAL. May be repeated; the default is all."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Also write the report to this Markdown page.", show_default=False)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the page's picture, if not the page's own.", show_default=False)
    ] = None,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    overwrite: RestartOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Ask simulated users questions, and compare the inferred rewards and soups with their true preferences."""
    check_extra("plot", "matplotlib")
    if len(quickstart or []) < seeds:
        check_extra("train", "trl", "datasets", "accelerate")
    from personalized_soups.studies.elicitation.page import PICTURE, agreement_rows, draw, gain_rows, report, summary
    from personalized_soups.studies.elicitation.study import COUNTS, ElicitationStudy, run_elicitation
    from personalized_soups.studies.folder import StudyFolder, write_results

    systems, count = _checked_systems(system), num_workers(workers)
    study = ElicitationStudy(seeds, users, prompts, systems=systems, device=device, num_workers=count)
    results = run_elicitation(study, out, quickstarts=quickstart or [], stage=render.progress, overwrite=overwrite)
    folder, content = StudyFolder(out), summary(study, results)
    drawn, reported = partial(draw, results), partial(report, study, results)
    write_results(folder, content, PICTURE, draw=drawn, report=reported, page=page, images=images)
    if as_json:
        render.show_json(content)
        return
    head = ["", *(str(count) for count in COUNTS)]
    render.show_table(head, agreement_rows(results), title="Share of held-out pairs in the right order, after answers")
    render.show_table(head, gain_rows(results), title="Gain of the soup, as a share of that of the declared weights")
    met = [[check["name"], f"{check['value']:.3f}", check["met"]] for check in content["checks"]]
    render.show_table(["target", "measured", "met"], met, title="targets")
    render.say(f"written to {folder.report}, {folder.results} and {folder.picture(PICTURE)}")


def _checked_systems(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the systems to compare with: all, if no name is given.

    Raises:
        UsageError: if a name is unknown.
    """
    from personalized_soups.studies.elicitation.rows import SYSTEMS

    for name in names or ():
        if name not in SYSTEMS:
            raise UsageError(f"unknown system {name!r}", where="system", mend=choose_from(name, SYSTEMS))
    return tuple(names or SYSTEMS)
