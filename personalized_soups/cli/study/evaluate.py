"""`psoups evaluate`: which experts work, alone, in pairs and mixed, and by which method and weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import catalogue_of, resolve_base
from personalized_soups.cli.options import (
    MAX_SEED,
    DeviceOption,
    DimensionsOption,
    JsonOption,
    OnOption,
    WorkersOption,
)
from personalized_soups.cli.study.run import finished_steps, reports_of, show_plan
from personalized_soups.cli.study.workers import num_workers
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.run_recipe import RunRecipe
    from personalized_soups.evaluation.expert_checks import ExpertChecks
    from personalized_soups.evaluation.systems import SystemsResults
    from personalized_soups.studies.pipeline.of_experts import ExpertsEvaluation
    from personalized_soups.studies.pipeline.run_folder import RunFolder


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
    on: OnOption = None,
    dimensions: DimensionsOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Merge methods to try, with commas between them. By default linear and factor_average.",
            show_default=False,
        ),
    ] = None,
    combinations: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of combinations of sides. If there are more, some are drawn. By default 16.",
            min=1,
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum length of an answer, in tokens. By default 256.", min=1, show_default=False),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature. By default 0.7.", min=0.0, show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed. By default 0.", min=0, max=MAX_SEED, show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype: float32 (the default), bfloat16, float16, or auto for the base's own dtype.",
            show_default=False,
        ),
    ] = None,
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
    from personalized_soups.studies.pipeline.run_folder import RunFolder

    folder = RunFolder(out)
    options = _Options(
        experts,
        base,
        prompts,
        dimensions,
        methods,
        num_combinations=combinations,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        on=on,
        dtype=dtype,
    )
    with options.declared(recipe, folder, dry_run=dry_run) as declared:
        _run(declared, folder, workers=num_workers(workers), device=device, dry_run=dry_run, as_json=as_json)


def _run(declared: RunRecipe, folder: RunFolder, *, workers: int, device: str, dry_run: bool, as_json: bool) -> None:
    from personalized_soups.studies.pipeline.expanding import steps_of

    steps = steps_of(declared, device=device)
    reports = reports_of(steps)
    if not reports:
        raise UsageError(
            "the recipe declares no step of the kind report", where="RECIPE", mend="add one, or use psoups run"
        )
    if dry_run:
        show_plan(steps, folder, as_json=as_json)
        return
    finished_steps(steps, folder, workers, quiet=as_json)
    for name in reports:
        _show(folder.files(name), as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Options:
    experts: Path | None
    base: str | None
    prompts: Path | None
    dimensions: Path | None
    methods: str | None
    num_combinations: int | None
    max_new_tokens: int | None
    temperature: float | None
    seed: int | None
    on: Path | None
    dtype: str | None

    @contextmanager
    def declared(self, recipe: Path | None, folder: RunFolder, *, dry_run: bool) -> Iterator[RunRecipe]:
        """Yield the given recipe, or the one for the experts, which is written into the folder of the run.

        In a dry run, it is written into a folder that exists during the block.

        Raises:
            UsageError: if both or none are given, or an option is missing.
            SoupError: if a file is missing or invalid, or the folder is of something else.
        """
        from personalized_soups.declare.loader import load
        from personalized_soups.declare.run_recipe import RunRecipe
        from personalized_soups.studies.pipeline.run_folder import RECIPE_FOLDER

        if recipe is not None:
            if any(value is not None for value in astuple(self)):
                raise UsageError(
                    "a recipe declares all that it evaluates",
                    where="RECIPE",
                    mend="give it with --out, --dry-run, --workers, --device and --json only, or leave it out",
                )
            yield load(recipe, RunRecipe)
            return
        evaluation = self._evaluation()
        folder.check()
        if dry_run:
            with TemporaryDirectory() as scratch:
                yield evaluation.write(Path(scratch))
        else:
            yield evaluation.write(folder.root / RECIPE_FOLDER)

    def _evaluation(self) -> ExpertsEvaluation:
        from personalized_soups.declare.dimension import Catalogue
        from personalized_soups.declare.loader import load
        from personalized_soups.studies.pipeline.of_experts import ExpertsEvaluation

        if self.experts is None or self.base is None or self.prompts is None:
            raise UsageError(
                "there is nothing to evaluate",
                where="RECIPE, --experts, --base, --prompts",
                mend="give a recipe, or all of --experts, --base and --prompts",
            )
        catalogue = load(catalogue_of(self.base, self.dimensions), Catalogue)
        given: dict[str, Any] = {
            "methods": None if self.methods is None else [name.strip() for name in self.methods.split(",")],
            "num_combinations": self.num_combinations,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "on": self.on,
            "dtype": self.dtype,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return ExpertsEvaluation(self.experts, resolve_base(self.base), self.prompts, catalogue, **chosen)


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
