"""The tables of results and the next steps that `psoups quickstart` prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli import render
from personalized_soups.cli.bases import EMBEDDED

if TYPE_CHECKING:
    from personalized_soups.evaluation.results import Comparison, Examples, Results

# The weights of the example profile.
_WEIGHTS = (0.3, 0.3, 0.7)


def show_results(results: Results, examples: Examples) -> None:
    """Print the example answers, the table of combinations, and the targets."""
    render.show_table(
        [answer["name"] for answer in examples["answers"]],
        [[answer["answer"] for answer in examples["answers"]]],
        title=f"“{examples['prompt']}”",
    )
    _show_combinations(results)
    if "comparison" in results:
        _show_systems("Systems, averaged over the combinations", results["comparison"])
    for name, external in results.get("external", {}).items():
        _show_systems(f"Systems on {external['num_prompts']} prompts of {name}", external)
    render.show_table(
        ["target", "measured", "bar", "met"],
        [[check["name"], _number(check["value"]), _bar(check["bar"]), check["met"]] for check in results["checks"]],
        title="targets",
    )


def _show_combinations(results: Results) -> None:
    from personalized_soups.evaluation.results import combinations_of, row_of

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


def _show_systems(title: str, comparison: Comparison) -> None:
    from personalized_soups.evaluation.results import title_of

    has_judges = all("judged_joint" in row for row in comparison["averages"])
    rows: list[list[str]] = []
    for row in comparison["averages"]:
        low, high = row["intervals"]["joint"]
        figures = [row["mean"], row["valid"], *([row["judged_joint"]] if has_judges else [])]
        joint = f"{row['joint']:.2f} [{low:.2f}, {high:.2f}]"
        rows.append([title_of(row["system"]), joint, *(f"{figure:.2f}" for figure in figures)])
    head = ["system", "joint [95% interval]", "mean", "valid", *(["joint, judges"] if has_judges else [])]
    render.show_table(head, rows, title=title)
    movements = comparison["movements"]
    num_moved = sum(movement["moved"] for movement in movements)
    render.say(f"The chosen soup moved {num_moved} of {len(movements)} scores towards their side.")


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def _bar(bar: object) -> str:
    if isinstance(bar, str):
        return bar
    if isinstance(bar, int | float):
        return f"at least {bar:g}"
    assert isinstance(bar, list | tuple)
    return f"{bar[0]:g} to {bar[1]:g}"


def next_steps(root: Path, results: Results, base: str) -> str:
    """Return a text that lists the files of the run and the commands to try next on its base."""
    from personalized_soups.evaluation.results import combinations_of

    seconds = results["seconds"]
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    sides = combinations_of(results)[1]
    example = root / "merged" / results["best_method"] / "+".join(sides)
    pictures = "combinations.png and sweeps.png" if results["sweeps"] else "combinations.png"
    on_base = "" if base == EMBEDDED else f" --base {base}"
    weights = ",".join(f"{side}={weight}" for side, weight in zip(sides, _WEIGHTS, strict=False))
    return f"""
{sum(seconds.values()):.0f} seconds: {spent}

files
  {root}/report.md           the report, with {pictures} in the same folder
  {root}/samples.md          answers of all systems side by side
  {root}/results.json        all figures
  {root}/experts/            the experts, as ordinary PEFT adapter folders
  {root}/merged/             the personal models, by method and combination
  {root}/pairs/              the preference pairs; {root}/answers/ holds all answers

next steps{_activation()}
  psoups playground{on_base} --experts {root}/experts --profiles profiles.db
  psoups generate --base {base} --adapter "{example}" "How do I clean an old kettle?"
  psoups generate --base {base} --experts {root}/experts --weights {weights} "How do I clean an old kettle?"
  psoups merge --experts {root}/experts --weights {weights} --out my-soup
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
