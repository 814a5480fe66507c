"""The tables of results and the next steps that `psoups quickstart` prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli import render

if TYPE_CHECKING:
    from personalized_soups.evaluation.results import Examples, Results


def show_results(results: Results, examples: Examples) -> None:
    """Print the example answers, the table of combinations, and the targets."""
    from personalized_soups.evaluation.results import combinations_of, row_of

    render.show_table(
        [answer["name"] for answer in examples["answers"]],
        [[answer["answer"] for answer in examples["answers"]]],
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
        title="Share of held-out answers that are valid, on topic and on the requested side of every dimension",
    )
    render.say(f"valid and wins (against the base, ties count half): {best['method']}, chosen on validation topics.")
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


def next_steps(root: Path, results: Results) -> str:
    """Return a text that lists the files of the run and the commands to try next."""
    seconds = results["seconds"]
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    example = root / "merged" / results["best_method"] / "elementary+concise+friendly"
    return f"""
{sum(seconds.values()):.0f} seconds: {spent}

files
  {root}/report.md           the report, with combinations.png and sweeps.png in the same folder
  {root}/results.json        all figures
  {root}/experts/            six experts, as ordinary PEFT adapter folders
  {root}/merged/             the personal models, by method and combination
  {root}/pairs/              the preference pairs; {root}/answers/ holds all answers

next steps{_activation()}
  psoups playground --experts {root}/experts --profiles profiles.db
  psoups generate --base tiny --adapter "{example}" "How do I clean an old kettle?"
  psoups merge --experts {root}/experts --weights expert=0.3,friendly=0.7 --out my-soup
  psoups inspect my-soup
  with your own base and data: psoups pairs --help, psoups train --help"""


def _activation() -> str:
    """Return a line with the command that puts `psoups` on the PATH, or an empty text if `psoups` is on the PATH."""
    import shutil
    import sys

    activate = Path(sys.executable).with_name("activate")
    if shutil.which("psoups") is not None or not activate.is_file():
        return ""
    return f"\n  source {os.path.relpath(activate)}"
