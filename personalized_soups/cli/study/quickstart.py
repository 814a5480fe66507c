"""`psoups quickstart`: the whole way on the embedded base, in minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.errors import UsageError, check_extra

if TYPE_CHECKING:
    from personalized_soups.evaluation.results import Examples, Results


# The study's stages add their own thousands to it, and NumPy's seeds have 32 bits.
_MAX_SEED = 4_000_000


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="quickstart")(quickstart)


def quickstart(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run in it goes on.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Of prompts, answers and trainings.", min=0, max=_MAX_SEED)] = 0,
    basis: Annotated[str, typer.Option(help="free: ordinary LoRA; shared: a common frozen A.")] = "free",
    workers: Annotated[int, typer.Option(help="Worker processes; 0 takes one per core, at most 6.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where the folder holds a run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Train six experts on the embedded base, merge a model for each of eight combinations, and score them all."""
    if basis not in {"free", "shared"}:
        raise UsageError(f"unknown basis {basis!r}", where="--basis", mend="choose free or shared")
    check_extra("train", "trl", "datasets", "accelerate")
    check_extra("plot", "matplotlib")

    from personalized_soups.evaluation.pictures.curves import draw_sweeps
    from personalized_soups.evaluation.pictures.heat_map import draw_combinations
    from personalized_soups.evaluation.report import report
    from personalized_soups.studies.folder import StudyFolder, write_text
    from personalized_soups.studies.quickstart import run_study
    from personalized_soups.studies.study import Study

    count = workers or min(6, len(os.sched_getaffinity(0)))
    study = Study(seed=seed, basis="shared" if basis == "shared" else "free", num_workers=count, device=device)
    done = (out / "results.json").is_file() and not overwrite
    try:
        results, examples = run_study(study, out, stage=render.progress, overwrite=overwrite)
    except KeyboardInterrupt:
        render.say(f"what is done is kept: psoups quickstart --out {out} goes on from there")
        raise
    folder = StudyFolder(out)
    pictures = {"combinations": draw_combinations, "sweeps": draw_sweeps}
    for name, draw in pictures.items():
        draw(results, folder.picture(name))
    write_text(folder.report, report(results, examples=examples))
    if as_json:
        render.show_json(results)
        return
    _show(results, examples)
    if done:
        render.say(f"\n{out} was complete already; --overwrite begins anew.")
    render.say(_whereabouts(folder.root, results))


def _show(results: Results, examples: Examples) -> None:
    from personalized_soups.evaluation.results import combinations_of, row_of

    render.show_table(
        [each["name"] for each in examples["answers"]],
        [[each["answer"] for each in examples["answers"]]],
        title=f"“{examples['prompt']}”",
    )
    methods = [row["method"] for row in results["methods"]]
    by_name = {row["method"]: row for row in results["methods"]}
    best = by_name[results["best_method"]]
    rows: list[list[str]] = []
    for sides in combinations_of(results):
        row = row_of(results, sides, best["method"])
        joints = [row_of(results, sides, method)["joint"] for method in methods]
        figures = [row["base_joint"], *joints, row["valid"], row["win_rate_vs_base"]]
        rows.append([" ".join(sides), *(f"{figure:.2f}" for figure in figures)])
    joints = [by_name[method]["joint"] for method in methods]
    figures = [results["base"]["joint"], *joints, best["valid"], best["win_rate_vs_base"]]
    rows.append(["average", *(f"{figure:.2f}" for figure in figures)])
    rows.append(["(weight of each expert)", "", *(f"{by_name[method]['weight']:g}" for method in methods), "", ""])
    render.show_table(
        ["combination", "base", *(method.replace("_", "\n") for method in methods), "valid", "wins"],
        rows,
        title="The share of held-out answers that are valid, on topic and on the asked side of every dimension",
    )
    render.say(f"valid and wins (against the base, ties half): {best['method']}, chosen on validation topics.")
    render.show_table(
        ["target", "measured", "bar", "met"],
        [[check["name"], _number(check["value"]), _bar(check["bar"]), check["met"]] for check in results["checks"]],
        title="targets",
    )


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def _bar(bar: object) -> str:
    if isinstance(bar, str):
        return bar
    if isinstance(bar, int | float):
        return f"at least {bar:g}"
    assert isinstance(bar, list | tuple)
    return f"{bar[0]:g} to {bar[1]:g}"


def _whereabouts(root: Path, results: Results) -> str:
    seconds = results["seconds"]
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    example = root / "merged" / results["best_method"] / "elementary+concise+friendly"
    return f"""
{sum(seconds.values()):.0f} seconds: {spent}

where everything is
  {root}/report.md           the report, with combinations.png and sweeps.png beside it
  {root}/results.json        every figure
  {root}/experts/            six experts: ordinary PEFT adapter folders
  {root}/merged/             the personal models, by method and combination
  {root}/pairs/              the preference pairs; {root}/answers/ has every answer

what to try next{_how_to_find()}
  psoups playground --experts {root}/experts --profiles profiles.db
  psoups generate --base tiny --adapter "{example}" "How do I clean an old kettle?"
  psoups merge --experts {root}/experts --weights expert=0.3,friendly=0.7 --out my-soup
  psoups inspect my-soup
  with your own base and data: psoups pairs --help, psoups train --help"""


def _how_to_find() -> str:
    """Return the command after which a shell finds `psoups`, where it does not find it now."""
    import shutil
    import sys

    activate = Path(sys.executable).with_name("activate")
    if shutil.which("psoups") is not None or not activate.is_file():
        return ""
    return f"\n  source {os.path.relpath(activate)}"
