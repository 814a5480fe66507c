"""`psoups evaluate`: which experts work, alone, in pairs and mixed, and by which method and weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import catalogue_of, resolve_base
from personalized_soups.cli.options import (
    DeviceOption,
    DimensionsOption,
    JsonOption,
    MaxNewTokensOption,
    SeedOption,
    TemperatureOption,
    WorkersOption,
)
from personalized_soups.cli.study.run import finished_steps, show_plan
from personalized_soups.cli.study.workers import num_workers
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.run_recipe import RunRecipe
    from personalized_soups.evaluation.expert_checks import ExpertChecks
    from personalized_soups.evaluation.systems import SystemsResults
    from personalized_soups.studies.pipeline.run_folder import RunFolder
    from personalized_soups.studies.pipeline.steps import Step


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="evaluate")(evaluate)


def evaluate(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe of a run with a report. Or give --experts.", show_default=False)
    ] = None,
    *,
    experts: Annotated[
        Path | None, typer.Option(help="Folder of experts. Each has the name of its side.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base of the experts, as for psoups train.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='File of prompts that no expert was trained on: one per line, or JSON Lines with the key "prompt". '
            "Every second one chooses method and weight, the others test.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run in this folder is resumed.")],
    dimensions: DimensionsOption = None,
    methods: Annotated[str, typer.Option(help="Merge methods to try, with commas between them.")] = (
        "linear,factor_average"
    ),
    combinations: Annotated[
        int, typer.Option(help="Maximum number of combinations of sides. If there are more, some are drawn.", min=1)
    ] = 16,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.7,
    seed: SeedOption = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what a run would do, and run nothing.")] = False,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find out which experts work alone, which pairs interfere, and which method and weight mix them best.

    With --experts, --base and --prompts, evaluate experts that were trained before. Answers are scored by the scorers
    of the catalogue. With a recipe, run its steps like psoups run, and show its report. The report is a page for a
    browser.
    """
    from personalized_soups.studies.pipeline.expanding import steps_of
    from personalized_soups.studies.pipeline.run_folder import RunFolder

    folder = RunFolder(out)
    sampling: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    options = _Options(recipe, experts, base, prompts, dimensions, methods, combinations)
    steps = steps_of(options.declared(folder, sampling), device=device)
    report = _report_of(steps)
    if dry_run:
        show_plan(steps, folder, as_json=as_json)
        return
    finished_steps(steps, folder, num_workers(workers), quiet=as_json)
    _show(folder.files(report), as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Options:
    recipe: Path | None
    experts: Path | None
    base: str | None
    prompts: Path | None
    dimensions: Path | None
    methods: str
    combinations: int

    def declared(self, folder: RunFolder, sampling: dict[str, Any]) -> RunRecipe:
        """Return the recipe: the given one, or the one for the experts, which is written into the folder of the run.

        Raises:
            UsageError: if both or none are given, or an option is missing.
            SoupError: if a file is missing or invalid.
        """
        from personalized_soups.declare.dimension import Catalogue
        from personalized_soups.declare.loader import load
        from personalized_soups.declare.run_recipe import RunRecipe
        from personalized_soups.studies.pipeline.of_experts import ExpertsEvaluation

        if self.recipe is not None:
            if (self.experts, self.base, self.prompts, self.dimensions) != (None, None, None, None):
                raise UsageError(
                    "a recipe declares its own experts, base, prompts and dimensions",
                    where="RECIPE, --experts, --base, --prompts, --dimensions",
                    mend="give the recipe alone, or the options without a recipe",
                )
            return load(self.recipe, RunRecipe)
        if self.experts is None or self.base is None or self.prompts is None:
            raise UsageError(
                "there is nothing to evaluate",
                where="RECIPE, --experts, --base, --prompts",
                mend="give a recipe, or all of --experts, --base and --prompts",
            )
        catalogue = load(catalogue_of(self.base, self.dimensions), Catalogue)
        tried = [name.strip() for name in self.methods.split(",")]
        return ExpertsEvaluation(
            self.experts,
            resolve_base(self.base),
            self.prompts,
            catalogue,
            tried,
            num_combinations=self.combinations,
            **sampling,
        ).write(folder)


def _report_of(steps: list[Step]) -> str:
    """Return the name of the step that reports.

    Raises:
        UsageError: if there is none.
    """
    from personalized_soups.studies.pipeline.reporting import ReportOn

    for step in reversed(steps):
        if isinstance(step.work, ReportOn):
            return step.name
    raise UsageError(
        "the recipe declares no step of the kind report", where="RECIPE", mend="add one, or use psoups run"
    )


def _show(report: Path, *, as_json: bool) -> None:
    results: SystemsResults = json.loads((report / "results.json").read_text(encoding="utf-8"))
    if as_json:
        render.show_json(results)
        return
    if "experts" in results:
        _show_experts(results["experts"])
    systems: list[list[render.Cell]] = [
        [scores["system"], scores["joint"], scores["mean"], scores["valid"]] for scores in results["averages"]
    ]
    render.show_table(["system", "joint", "mean", "valid"], systems, title="On the test prompts")
    for choice in results["choices"]:
        render.say(f"{', '.join(choice['systems'])}: method {choice['method']}, weight {choice['weight']:g}")
    render.say(f"report: {report / 'report.html'}")


def _show_experts(checks: ExpertChecks) -> None:
    alone: list[list[render.Cell]] = [
        [
            check["side"],
            check["weight"],
            check["base"],
            check["score"],
            check["valid"],
            check["verdict"],
        ]
        for check in checks["alone"]
    ]
    columns = ["expert", "weight", "base", "alone", "valid", "verdict"]
    render.show_table(columns, alone, title="Each expert alone: score towards its side")
    harmed: list[list[render.Cell]] = [
        [check["side"], check["other"], check["alone"], check["pair"]]
        for check in checks["pairs"]
        if check["interferes"]
    ]
    if harmed:
        render.show_table(["side", "with", "alone", "in the pair"], harmed, title="Pairs that interfere")
    else:
        render.say("No pair of experts interferes.")
