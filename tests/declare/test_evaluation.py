from __future__ import annotations

import pytest

from personalized_soups.declare.base_table import named_bases
from personalized_soups.declare.dimension import Catalogue, MarkersScorer
from personalized_soups.declare.evaluation import StudyRecipe
from personalized_soups.declare.loader import dump, load, load_text
from personalized_soups.declare.shipped import recipes_folder, shipped_recipe
from personalized_soups.errors import DeclarationError


def test_every_shipped_study_loads_and_dumps() -> None:
    paths = sorted((recipes_folder() / "evaluation").rglob("*.yaml"))
    assert [path.name for path in paths] == ["quickstart.yaml", "smollm2-full.yaml", "smollm2.yaml"]
    recipe = load(paths[0], StudyRecipe)
    assert load_text(dump(recipe), StudyRecipe, "dump") == recipe
    assert recipe.num_prompts >= 96


@pytest.mark.parametrize(
    ("line", "changed", "what"),
    [
        ("linear: [0.4, 0.5, 0.6]", "linear: [0.4, 0.6, 0.5]", "not in rising order"),
        ("linear: [0.4, 0.5, 0.6]", "linear: [0.4, 0.4]", "not in rising order"),
        ("linear: [0.4, 0.5, 0.6]", "linear: []", "linear"),
        ("linear: [0.4, 0.5, 0.6]", "linaer: [0.4]", "linaer"),
        ("min_gap: 0.3", "min_gap: 1.5", "min_gap"),
        ("num_samples: 4", "num_samples: 1", "num_samples"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_line(line: str, changed: str, what: str) -> None:
    text = (
        "pairs:\n  num_prompts: 8\n  num_samples: 4\n  min_gap: 0.3\n  max_pairs: 8\n"
        "selection:\n  num_prompts: 8\n  weights:\n    linear: [0.4, 0.5, 0.6]\n"
        "sweep: {num_prompts: 8, num_steps: 3}\nnum_prompts: 8\n"
    )
    load_text(text, StudyRecipe, "study.yaml")
    assert line in text
    with pytest.raises(DeclarationError) as caught:
        load_text(text.replace(line, changed), StudyRecipe, "study.yaml")
    number = next(n for n, each in enumerate(text.splitlines(), start=1) if line in each)
    assert f"study.yaml:{number}" in caught.value.where
    assert what in f"{caught.value.what} {caught.value.where}"


RECIPE = (
    "pairs: {num_prompts: 8, num_samples: 4, min_gap: 0.3, max_pairs: 8}\n"
    "selection: {num_prompts: 8, weights: {linear: [0.5]}}\n"
    "num_prompts: 8\n"
)
JUDGES = {
    "expertise": "{kind: length, low: 5, high: 50}",
    "informativeness": "{kind: readability, low: 4, high: 14}",
    "style": "{kind: markers, high: [dearest], low: [so what]}",
}


def recipe_with(judges: dict[str, str]) -> StudyRecipe:
    lines = "".join(f"  {name}: {judge}\n" for name, judge in judges.items())
    return load_text(RECIPE + ("judges:\n" + lines if judges else ""), StudyRecipe, "study.yaml")


def psoups() -> Catalogue:
    return load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)


def test_each_dimension_needs_a_judge_that_did_not_label_its_pairs() -> None:
    recipe_with({}).check_judges(psoups())
    recipe_with(JUDGES).check_judges(psoups())
    recipe_with(JUDGES).check_judges(load(shipped_recipe("dimensions/tiny.yaml"), Catalogue))


@pytest.mark.parametrize(
    ("changed", "what", "line"),
    [
        # psoups.yaml labels expertise by readability. Another scale of the same measure is no other judge.
        ({"expertise": "{kind: readability, low: 4, high: 14}"}, "labels the pairs of 'elementary'", 5),
        ({"expertise": "{kind: readability, low: 1, high: 20}"}, "labels the pairs of 'elementary'", 5),
        ({"informativeness": "{kind: length, low: 1, high: 2}"}, "labels the pairs of 'concise'", 6),
        ({"colour": "{kind: length, low: 1, high: 2}"}, "unknown dimension 'colour'", 8),
    ],
)
def test_a_judge_that_is_no_second_measure_is_refused(changed: dict[str, str], what: str, line: int) -> None:
    with pytest.raises(DeclarationError) as caught:
        recipe_with({**JUDGES, **changed}).check_judges(psoups())
    assert what in str(caught.value)
    assert f"study.yaml:{line}: judges" in caught.value.where


def test_a_judge_equal_to_the_scorer_of_one_side_is_refused() -> None:
    sassy = psoups().sides["sassy"].scorer
    assert isinstance(sassy, MarkersScorer)
    judge = recipe_with(JUDGES)
    same = judge.replaced(judges={**judge.judges, "style": sassy})
    with pytest.raises(DeclarationError, match="labels the pairs of 'sassy'"):
        same.check_judges(psoups())


def test_a_dimension_without_a_judge_is_refused_only_if_others_have_one() -> None:
    with pytest.raises(DeclarationError, match="the dimension 'style' has no judge"):
        recipe_with({name: judge for name, judge in JUDGES.items() if name != "style"}).check_judges(psoups())


@pytest.mark.parametrize(
    ("systems", "what"),
    [("[soup_prompting, best_guess]", "best_guess"), ("[single_expert, single_expert]", "repeated")],
)
def test_an_unknown_and_a_repeated_system_are_refused(systems: str, what: str) -> None:
    with pytest.raises(DeclarationError, match=what) as caught:
        load_text(RECIPE + f"systems: {systems}\n", StudyRecipe, "study.yaml")
    assert "study.yaml:4: systems" in caught.value.where


@pytest.mark.parametrize(
    ("keys", "what", "mend", "key"),
    [
        ("plain: 2, instructed: 3", "add up to 5, but num_samples is 4", "plain: 1, or num_samples: 5", "plain"),
        ("plain: 3", "plain (3) and instructed (0) add up to 3", "plain: 4", "plain"),
        ("instructed: 5", "5 answers are instructed, but only 4", "instructed: 4 or less", "instructed"),
        ("instructed: -1", "instructed", "", "instructed"),
    ],
)
def test_shares_of_a_pool_that_do_not_add_up_are_refused(keys: str, what: str, mend: str, key: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        load_text(RECIPE.replace("num_samples: 4", f"num_samples: 4, {keys}"), StudyRecipe, "study.yaml")
    assert what in f"{caught.value.what} {caught.value.where}"
    assert mend in caught.value.mend
    assert caught.value.where == f"study.yaml:1: pairs.{key}"


def test_shares_of_a_pool_that_add_up() -> None:
    text = RECIPE.replace("num_samples: 4", "num_samples: 4, plain: 1, instructed: 3, match_length: true")
    pairs = load_text(text, StudyRecipe, "study.yaml").pairs
    assert (pairs.plain, pairs.instructed, pairs.match_length, pairs.whole_sentences) == (1, 3, True, False)
    assert load_text(RECIPE, StudyRecipe, "study.yaml").pairs.instructed == 0


def test_a_judge_of_markers_shares_no_phrase_with_the_markers_that_label() -> None:
    style = "{kind: markers, high: [cosy, 'Happy  to help'], low: [brr]}"
    with pytest.raises(DeclarationError, match="labels the pairs of 'friendly'"):
        recipe_with({**JUDGES, "style": style}).check_judges(psoups())
    recipe_with({**JUDGES, "style": style.replace("Happy  to help", "happy helper")}).check_judges(psoups())


@pytest.mark.parametrize("name", ["smollm2.yaml", "smollm2-full.yaml"])
def test_the_shipped_judges_are_independent_of_the_shipped_catalogues(name: str) -> None:
    recipe = load(shipped_recipe(f"evaluation/{name}"), StudyRecipe)
    for catalogue in ("psoups.yaml", named_bases()["smollm2"].dimensions.partition("/")[2]):
        sides = recipe.catalogue_of(load(shipped_recipe(f"dimensions/{catalogue}"), Catalogue))
        assert set(recipe.judges) == set(sides.dimensions)
        recipe.check_judges(sides)
