"""`psoups evaluate`: experts of before, and recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.declare.dimension import Catalogue, ClassifierScorer
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.studies.pipeline.of_experts import ExpertsEvaluation
from tests.cli.conftest import Run
from tests.experts import write_expert

CATALOGUE = """
dimensions:
  size:
    about: How long the answer is.
    scorer: {kind: length, low: 0, high: 20}
    sides:
      short: {instruction: Be brief., end: low}
      long: {instruction: Tell all.}
  tone:
    about: Whether it is warm.
    scorer: {kind: classifier, path: tone}
    sides:
      warm: {instruction: Be warm., scorer: {kind: markers, high: [lamp], low: [soap]}}
      cold: {instruction: Be cold., end: low}
"""
# The third prompt is the first one again, and the second has a line separator that is no end of a line.
PROMPTS = "wash the kettle\n\nrub the\u2028towel\nwash the kettle\ndry the old soap\nwash the old towel\nrub the soap\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a catalogue, prompts and experts, one of which is for no side."""
    (tmp_path / "dimensions.yaml").write_text(CATALOGUE)
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    for seed, side in enumerate(("short", "long", "warm", "merged")):
        write_expert(tmp_path / "experts" / side, seed=seed)
    return tmp_path


def evaluation(folder: Path, **options: Any) -> ExpertsEvaluation:
    catalogue = load(folder / "dimensions.yaml", Catalogue)
    return ExpertsEvaluation(folder / "experts", "tiny", folder / "prompts.txt", catalogue, **options)


def test_the_recipe_has_the_sides_with_experts_and_no_prompt_for_two_ends(folder: Path) -> None:
    written = folder / "out" / "recipe"
    recipe = evaluation(folder, num_combinations=1, dtype="bfloat16", on=folder / "sft").write(written)
    assert (recipe.dtype, recipe.on) == ("bfloat16", str(folder / "sft"))
    assert load(written / "recipe.yaml", RunRecipe) == recipe
    catalogue = load(written / "dimensions.yaml", Catalogue)
    assert list(catalogue.sides) == ["short", "long", "warm"]
    scorer = catalogue.dimensions["tone"].scorer
    assert isinstance(scorer, ClassifierScorer)
    assert scorer.path == str(folder / "tone")  # the file of the catalogue has moved
    texts = {path.name.partition("-")[0]: path.read_text(encoding="utf-8") for path in written.glob("*.txt")}
    assert texts == {
        "test": "wash the kettle\ndry the old soap\nrub the soap\n",
        "validation": "rub the\u2028towel\nwash the old towel\n",
    }
    assert len(recipe.combinations(catalogue)) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", "give a recipe, or all of --experts, --base and --prompts"),
        ("--prompts FOLDER/prompts.txt", "", "give a recipe, or all of --experts, --base and --prompts"),
        ("--experts", "FOLDER/run.yaml --experts", "a recipe declares all that it evaluates"),
        ("--experts FOLDER/experts", "FOLDER/run.yaml --seed 1", "a recipe declares all that it evaluates"),
        ("FOLDER/experts", "FOLDER/none", "FOLDER/none"),
        ("--base BASE", "--base BASE --methods factor_average", "add linear"),
        ("--base BASE", "--base BASE --methods linear,blend", "'blend' is not a known merge method"),
        ("--base BASE", "--base BASE --dtype float8", "dtype"),
        ("FOLDER/prompts.txt", "FOLDER/few.txt", "fewer than 4 different prompts"),
        ("--dimensions FOLDER/dimensions.yaml", "", "give the catalogue that declares the sides of these experts"),
        ("--out FOLDER/out", "--out FOLDER", "it is not that of a run"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    old: str, new: str, message: str, *, psoups: Run, folder: Path, small_base: Path
) -> None:
    (folder / "few.txt").write_text("a\nb\nc\na\n")
    options = (
        "--experts FOLDER/experts --base BASE --prompts FOLDER/prompts.txt --dimensions FOLDER/dimensions.yaml "
        "--out FOLDER/out"
    )
    assert old in options
    asked = options.replace(old, new, 1) if old else "--out FOLDER/out"
    words = [word.replace("FOLDER", str(folder)).replace("BASE", str(small_base)) for word in asked.split()]
    code, _, err = psoups("evaluate", *words)
    assert code == 2, err
    assert message.replace("FOLDER", str(folder)) in err
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_experts_are_checked_alone_in_pairs_and_mixed(psoups: Run, folder: Path, small_base: Path) -> None:
    text = (
        (folder / "dimensions.yaml")
        .read_text()
        .replace("{kind: classifier, path: tone}", "{kind: length, low: 1, high: 9}")
    )
    (folder / "dimensions.yaml").write_text(text)
    arguments = ["--experts", folder / "experts", "--base", small_base, "--prompts", folder / "prompts.txt"]
    arguments += ["--dimensions", folder / "dimensions.yaml", "--out", folder / "out", "--max-new-tokens", 8]
    arguments += ["--device", "cpu", "--workers", 1]
    code, out, err = psoups("evaluate", *arguments)
    assert code == 0, err
    assert "Each expert alone" in out
    assert "report.html" in err
    code, out, err = psoups("evaluate", *arguments, "--json")
    results = json.loads(out)
    assert [scores["system"] for scores in results["averages"]] == ["base", "prompting", "soup", "soup-prompted"]
    assert results["num_prompts"] == 3
    assert {tuple(sides) for sides in results["combinations"]} == {("short", "warm"), ("long", "warm")}
    methods = {score["method"] for score in results["choices"][0]["scores"]}
    assert methods == {"linear", "factor_average"}
    assert {check["side"] for check in results["experts"]["alone"]} == {"short", "long", "warm"}
    assert {(check["side"], check["other"]) for check in results["experts"]["pairs"]} == {
        ("short", "warm"),
        ("warm", "short"),
        ("long", "warm"),
        ("warm", "long"),
    }
    assert results["costs"] == [row for row in results["costs"] if row["trainings"] == 0]
    # another expert changes the steps that depend on it
    write_expert(folder / "experts" / "warm", seed=9)
    before = sorted((folder / "out" / "recipe").iterdir())
    code, out, err = psoups("evaluate", *arguments, "--dry-run", "--json")
    assert sorted((folder / "out" / "recipe").iterdir()) == before  # a dry run writes nothing
    changed = {row["step"] for row in json.loads(out) if row["would be"] != "done"}
    assert changed == {"experts-warm", "chosen", "soup", "soup-prompted", "interference", "report"}
    # the recipe that was written is one that can be run
    recipe = folder / "out" / "recipe" / "recipe.yaml"
    code, out, err = psoups("evaluate", recipe, "--out", folder / "other", "--dry-run", "--json")
    assert code == 0, err
    assert len(json.loads(out)) == 3 + 7
    # without a report, there is nothing to show
    recipe.write_text(recipe.read_text().partition("  report:")[0])
    code, out, err = psoups("evaluate", recipe, "--out", folder / "other", "--dry-run")
    assert code == 2
    assert "no step of the kind report" in err
