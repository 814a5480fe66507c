"""`psoups run` from prompts to merged models, on a small base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import read_soup_record
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.declare.shipped import recipes_folder, shipped_recipe
from personalized_soups.studies.pipeline.expanding import steps_of
from personalized_soups.studies.pipeline.steps import in_order
from tests.base_adapters import write_sft
from tests.cli.conftest import Run

DIMENSIONS = """
dimensions:
  informativeness:
    about: How much the answer says.
    scorer: {kind: length, low: 0, high: 20}
    sides:
      concise: {instruction: Be brief., end: low}
      informative: {instruction: Tell all.}
"""
DPO = "dpo: {beta: 0.3, max_length: 96}"
TRAIN = f"""
lora: {{rank: 4, alpha: 8}}
{DPO}
optimizer: {{learning_rate: 1.0e-3, max_steps: 2, batch_size: 2}}
"""
REWARD = TRAIN.replace(DPO, "reward: {max_length: 96}")
RECIPE = """
base: BASE
dimensions: dimensions.yaml
steps:
  pool: {kind: rollouts, prompts: prompts.txt, num_samples: 4, max_new_tokens: 24}
  labels: {kind: label, rollouts: pool}
  pairs: {kind: pairs, labels: labels, min_gap: 0.05}
  experts: {kind: train, pairs: pairs, recipe: train.yaml}
  soups: {kind: merge, experts: experts, weight: 0.6}
"""


@pytest.fixture
def recipe(small_base: Path, tmp_path: Path) -> Path:
    (tmp_path / "dimensions.yaml").write_text(DIMENSIONS)
    (tmp_path / "train.yaml").write_text(TRAIN)
    (tmp_path / "prompts.txt").write_text("wash the kettle\nrub the towel\ndry the old soap\n")
    (tmp_path / "test.txt").write_text("wash the towel\nrub the soap\ndry the old kettle\n")
    (tmp_path / "validation.txt").write_text("wash the soap\nrub the kettle\n")
    (tmp_path / "run.yaml").write_text(RECIPE.replace("BASE", str(small_base)))
    return tmp_path / "run.yaml"


def run(psoups: Run, recipe: Path, *more: object) -> tuple[int, str, str]:
    return psoups("run", recipe, "--out", recipe.parent / "out", "--workers", 1, "--device", "cpu", "--json", *more)


def states(psoups: Run, recipe: Path) -> dict[str, str]:
    code, out, _ = run(psoups, recipe, "--dry-run")
    assert code == 0
    return {row["step"]: row["would be"] for row in json.loads(out)}


@pytest.mark.slow
def test_a_run_makes_soups_and_a_rerun_only_what_changed(psoups: Run, recipe: Path) -> None:
    names = ["pool", "labels-concise", "labels-informative", "pairs-concise", "pairs-informative"]
    names += ["experts-concise", "experts-informative", "soups-concise", "soups-informative"]
    assert states(psoups, recipe) == dict.fromkeys(names, "run")
    assert not (recipe.parent / "out").exists()  # a dry run writes nothing
    code, out, err = run(psoups, recipe)
    assert code == 0, err
    assert (json.loads(out)["steps"], json.loads(out)["run"]) == (9, 9)
    steps = recipe.parent / "out" / "steps"
    library = ExpertLibrary.open(steps / "experts-concise", steps / "experts-informative")
    assert set(library) == {"concise", "informative"}
    soup = read_soup_record(steps / "soups-concise" / "concise")
    assert soup is not None
    assert soup.profile["weights"] == {"concise": 0.6}
    assert states(psoups, recipe) == dict.fromkeys(names, "done")

    recipe.write_text(recipe.read_text().replace("weight: 0.6", "weight: 0.7"))
    assert {name for name, state in states(psoups, recipe).items() if state != "done"} == {
        "soups-concise",
        "soups-informative",
    }
    assert json.loads(run(psoups, recipe)[1])["run"] == 2

    # fewer pairs are other pairs for neither side: the trainings read equal files and do not run
    recipe.write_text(recipe.read_text().replace("min_gap: 0.05", "min_gap: 0.05, max_pairs: 999"))
    assert states(psoups, recipe)["experts-concise"] == "maybe"
    assert json.loads(run(psoups, recipe)[1])["run"] == 2


@pytest.mark.parametrize(
    ("old", "new", "message", "place"),
    [
        ("rollouts: pool", "rollouts: poll", "did you mean 'pool'?", "run.yaml:6: steps.labels.rollouts"),
        ("labels: labels", "labels: pool", "name a step of the kind 'label'", "run.yaml:7: steps.pairs.labels"),
        ("prompts: prompts.txt", "prompts: none.txt", "there is no file", "run.yaml:5: steps.pool.prompts"),
        ("recipe: train.yaml", "recipe: none.yaml", "there is no file", "run.yaml:8: steps.experts.recipe"),
        ("pairs: pairs, ", "", "trains on pairs", "run.yaml:8: steps.experts"),
        ("kind: merge", "kind: blend", "blend", "run.yaml:9"),
        ("prompts: prompts.txt,", "prompts: prompts.txt, skip_prompts: 3,", "there are 3", "prompts.txt"),
        ("prompts: prompts.txt,", "prompts: prompts.txt, split: test,", "prompts.txt", "prompts.txt:1"),
    ],
)
def test_a_faulty_recipe_is_named_with_its_line(
    old: str, new: str, message: str, place: str, *, psoups: Run, recipe: Path
) -> None:
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new))
    code, _, err = run(psoups, recipe)
    assert code == 2
    assert message in err
    assert place in err
    assert not (recipe.parent / "out").exists()


SYSTEMS = """
  policy_labels: {kind: label, rollouts: pool, targets: combinations}
  policy_pairs: {kind: pairs, labels: policy_labels, min_gap: 0.05}
  policies: {kind: train, pairs: policy_pairs, recipe: train.yaml}
  read_pairs: {kind: pairs, labels: labels, min_gap: 0.05, max_pairs: 4, conditioned: true}
  reader: {kind: train, method: sft, pairs: read_pairs, recipe: sft.yaml}
  base: {kind: answers, prompts: test.txt, max_new_tokens: 8}
  prompted: {kind: answers, prompts: test.txt, max_new_tokens: 8, policies: reader, prompted: true}
  p-morl: {kind: answers, prompts: test.txt, max_new_tokens: 8, policies: policies}
  mixed: {kind: answers, prompts: test.txt, max_new_tokens: 8, experts: experts, weight: 0.6}
  merged: {kind: answers, prompts: test.txt, max_new_tokens: 8, soups: soups}
  report: {kind: report, systems: [base, prompted, p-morl, mixed, merged], primary: [mixed, base]}
"""
MORE = """
  policies: {kind: train, method: grpo, targets: everyone, prompts: prompts.txt, recipe: grpo.yaml}
  bones: {kind: train, pairs: bone_pairs, recipe: train.yaml}
  bone_pairs: {kind: pairs, labels: bone_labels, min_gap: 0.05}
  bone_labels: {kind: label, rollouts: pool, targets: dimensions}
  models: {kind: train, method: reward, pairs: pairs, recipe: reward.yaml}
  chosen: {kind: choose, experts: experts, prompts: validation.txt, max_new_tokens: 8, weights: {linear: [0.5, 1.0]}}
  base: {kind: answers, prompts: test.txt, max_new_tokens: 8}
  RLHF: {kind: answers, prompts: test.txt, max_new_tokens: 8, policies: policies}
  bone: {kind: answers, prompts: test.txt, max_new_tokens: 8, experts: bones, weight: 0.5}
  soup: {kind: answers, prompts: test.txt, max_new_tokens: 8, experts: experts, choice: chosen}
  sweep: {kind: sweep, prompts: test.txt, max_new_tokens: 8, experts: experts, choice: chosen, num_steps: 3}
  pairwise: {kind: interference, prompts: test.txt, max_new_tokens: 8, experts: experts, choice: chosen}
  report:
    kind: report
    systems: [base, RLHF, bone, soup]
    primary: [soup, base]
    reward_models: models
    fronts: [sweep, bone]
    interference: pairwise
"""


def with_systems(recipe: Path) -> Path:
    """Add the systems and their report to a recipe."""
    (recipe.parent / "sft.yaml").write_text(TRAIN.replace(DPO, "sft: {max_length: 96}"))
    (recipe.parent / "reward.yaml").write_text(REWARD)
    recipe.write_text(recipe.read_text() + SYSTEMS)
    return recipe


@pytest.mark.slow
def test_a_run_compares_systems_and_a_rerun_only_what_changed(psoups: Run, recipe: Path) -> None:
    code, _, err = run(psoups, with_systems(recipe))
    assert code == 0, err
    steps = recipe.parent / "out" / "steps"
    pairs = [json.loads(line) for line in (steps / "read_pairs-read_pairs" / "pairs.jsonl").read_text().splitlines()]
    texts = ["Be brief.\n\n", "Tell all.\n\n"]
    assert {
        text for text in texts for pair in pairs if text in json.dumps(pair, ensure_ascii=False).replace("\\n", "\n")
    } == {*texts}
    assert len(pairs) <= 8
    results = json.loads((steps / "report" / "results.json").read_text())
    assert [scores["system"] for scores in results["averages"]] == ["base", "prompted", "p-morl", "mixed", "merged"]
    assert results["num_prompts"] == 3
    costs = {cost["system"]: (cost["trainings"], cost["grows"]) for cost in results["costs"]}
    assert costs == {
        "base": (0, "0"),
        "prompted": (1, "1"),
        "p-morl": (2, "2^n"),
        "mixed": (2, "2n"),
        "merged": (2, "2n"),
    }
    assert all(cost["seconds"] > 0 for cost in results["costs"] if cost["trainings"])
    # a merged model answers as its experts do when they are mixed
    assert (steps / "merged" / "answers.jsonl").read_text() == (steps / "mixed" / "answers.jsonl").read_text()
    assert {path.name for path in (steps / "report").iterdir() if not path.name.startswith(".")} == {
        "answers.parquet",
        "radars.png",
        "report.html",
        "report.md",
        "results.json",
        "trainings.png",
        "win_rates.png",
    }
    recipe.write_text(
        recipe.read_text().replace(
            "experts: experts, weight: 0.6}\n  merged", "experts: experts, weight: 0.5}\n  merged"
        )
    )
    assert {name for name, state in states(psoups, recipe).items() if state != "done"} == {"mixed", "report"}


def test_a_faulty_training_recipe_is_named_before_anything_runs(psoups: Run, recipe: Path) -> None:
    (recipe.parent / "train.yaml").write_text(TRAIN.replace("rank: 4", "rank: none"))
    code, _, err = run(psoups, recipe)
    assert code == 2
    assert "train.yaml:2: lora.rank" in err
    assert not (recipe.parent / "out").exists()


def test_a_dry_run_says_how_much_work_there_is(psoups: Run, recipe: Path) -> None:
    code, out, _ = run(psoups, with_systems(recipe), "--dry-run")
    assert code == 0
    work = {row["step"]: row["work"] for row in json.loads(out)}
    assert work["pool"] == "12 answers"
    assert work["experts-concise"] == "2 steps of 2"
    assert work["base"] == "3 answers"  # one for all combinations
    assert work["mixed"] == "6 answers"
    assert work["report"] == ""


def test_policies_for_some_combinations_are_compared_on_these(psoups: Run, recipe: Path) -> None:
    text = with_systems(recipe).read_text()
    recipe.write_text(text.replace("targets: combinations", "targets: combinations, combinations: [[informative]]"))
    code, out, err = run(psoups, recipe, "--dry-run")
    assert code == 0, err
    work = {row["step"]: row["work"] for row in json.loads(out)}
    assert [name for name in work if name.startswith("policies")] == ["policies-informative"]
    assert work["p-morl"] == "3 answers"
    steps = {step.name: step for step in steps_of(load(recipe, RunRecipe), device="cpu")}
    assert steps["report"].work.combinations == (("informative",),)  # type: ignore[attr-defined]
    recipe.write_text(recipe.read_text().replace("primary:", "combinations: [[concise]], primary:"))
    code, _, err = run(psoups, recipe, "--dry-run")
    assert code == 2
    assert "the system 'p-morl' has not answered for all combinations" in err


TWO_DIMENSIONS = (
    DIMENSIONS
    + """
  style:
    about: Whether it is warm.
    scorer: {kind: markers, high: [lamp], low: [soap]}
    sides:
      warm: {instruction: Be warm.}
      cold: {instruction: Be cold., end: low}
"""
)


def keys(recipe: Path) -> dict[str, str]:
    """Return what each step's files depend on, apart from the files of other steps."""
    steps = in_order(steps_of(load(recipe, RunRecipe), device="cpu"))
    return {step.name: step.key(dict.fromkeys(step.needs, "")) for step in steps}


def test_other_combinations_are_other_work_and_unused_experts_are_not_trained(recipe: Path) -> None:
    (recipe.parent / "dimensions.yaml").write_text(TWO_DIMENSIONS)
    text = with_systems(recipe).read_text()
    recipe.write_text(text.replace("steps:", "num_combinations: 2\nsteps:", 1))
    two = keys(recipe)
    recipe.write_text(text.replace("steps:", "num_combinations: 3\nsteps:", 1))
    three = keys(recipe)
    for name in ("base", "mixed", "p-morl", "report"):
        assert two[name] != three[name]
    assert two["pool"] == three["pool"]
    # only the experts of the combination are merged, and nothing else uses them
    merges = RECIPE.replace("BASE", str(load(recipe, RunRecipe).base))
    recipe.write_text(merges.replace("steps:", "num_combinations: 1\nsteps:", 1))
    assert len([name for name in keys(recipe) if name.startswith("experts-")]) == 2


def test_a_classifier_that_was_trained_again_makes_its_labels_again(recipe: Path) -> None:
    (recipe.parent / "tone").mkdir()
    (recipe.parent / "tone" / "classifier.json").write_text("{}")
    scorer = "{kind: classifier, path: tone}"
    (recipe.parent / "dimensions.yaml").write_text(DIMENSIONS.replace("{kind: length, low: 0, high: 20}", scorer))
    with_systems(recipe)
    before = keys(recipe)
    (recipe.parent / "tone" / "classifier.json").write_text("{ }")
    after = keys(recipe)
    changed = {name for name in before if before[name] != after[name]}
    assert {"labels-concise", "labels-informative", "report"} <= changed
    assert not changed & {"pool", "pairs-concise", "experts-concise", "base", "mixed"}


def test_a_side_without_a_scorer_is_named_before_anything_runs(psoups: Run, recipe: Path) -> None:
    text = DIMENSIONS.replace("    scorer: {kind: length, low: 0, high: 20}\n", "")
    (recipe.parent / "dimensions.yaml").write_text(text)
    (recipe.parent / "judge.yaml").write_text("kind: llm\n")
    answers = "  base: {kind: answers, prompts: test.txt}\n"
    judged = recipe.read_text().replace("kind: label, ", "kind: label, judge: judge.yaml, ") + answers
    recipe.write_text(judged)
    assert run(psoups, recipe, "--dry-run")[0] == 0  # a judge labels, and nothing grades
    more = "  soup: {kind: answers, prompts: test.txt, experts: experts, weight: 0.6}\n"
    recipe.write_text(f"{judged}{more}  report: {{kind: report, systems: [base, soup], primary: [soup, base]}}\n")
    code, _, err = run(psoups, recipe, "--dry-run")
    assert code == 2
    assert "concise" in err
    assert "scorer" in err


def test_on_top_of_an_adapter_experts_are_mixed_and_not_merged(psoups: Run, recipe: Path) -> None:
    write_sft(recipe.parent / "sft")
    before = keys(recipe)
    recipe.write_text(recipe.read_text().replace("steps:", "on: sft\nsteps:", 1))
    code, _, err = run(psoups, recipe, "--dry-run")
    assert code == 2
    assert "experts can only be mixed by the method linear" in err
    assert "run.yaml:10: steps.soups.kind" in err
    mixed = "soups: {kind: answers, prompts: test.txt, experts: experts, weight: 0.6}"
    recipe.write_text(recipe.read_text().replace("soups: {kind: merge, experts: experts, weight: 0.6}", mixed))
    assert keys(recipe)["pool"] != before["pool"]
    recipe.write_text(recipe.read_text().replace("weight: 0.6}", "weight: 0.6, method: ties}"))
    code, _, err = run(psoups, recipe, "--dry-run")
    assert code == 2
    assert "steps.soups.method" in err
    recipe.write_text(recipe.read_text().replace("on: sft", "on: none"))
    code, _, err = run(psoups, recipe, "--dry-run")
    assert code == 2
    assert str(recipe.parent / "none") in err


def test_the_beta_of_backbones_is_in_the_key_of_their_answers(recipe: Path) -> None:
    (recipe.parent / "dimensions.yaml").write_text(TWO_DIMENSIONS)
    steps = """
  bone_labels: {kind: label, rollouts: pool, targets: dimensions, beta: 0.7}
  bone_pairs: {kind: pairs, labels: bone_labels}
  bones: {kind: train, pairs: bone_pairs, recipe: train.yaml}
  bone: {kind: answers, prompts: test.txt, experts: bones, weight: 0.5}
"""
    recipe.write_text(recipe.read_text() + steps)
    before = keys(recipe)
    recipe.write_text(recipe.read_text().replace("beta: 0.7", "beta: 0.8"))
    assert keys(recipe)["bone"] != before["bone"]


@pytest.mark.slow
def test_two_seeds_with_judges_fronts_and_checks_have_one_report(psoups: Run, recipe: Path) -> None:
    folder = recipe.parent
    (folder / "reward.yaml").write_text(REWARD)
    grpo = "grpo: {beta: 0.1, num_generations: 2, max_new_tokens: 8}"
    (folder / "grpo.yaml").write_text(TRAIN.replace(DPO, grpo))
    recipe.write_text(recipe.read_text().replace("  soups: {kind: merge, experts: experts, weight: 0.6}\n", "") + MORE)
    code, _, err = run(psoups, recipe)
    assert code == 0, err
    steps = folder / "out" / "steps"
    first = json.loads((steps / "report" / "results.json").read_text())
    assert first["num_prompts"] == 3
    assert first["seeds"] == []
    code, out, err = run(psoups, recipe, "--seeds", 2)
    assert code == 0, err
    # all of the second seed without its interference, which no report reads, and the report
    assert (json.loads(out)["run"], json.loads(out)["steps"]) == (20, 40)
    results = json.loads((steps / "report" / "results.json").read_text())
    assert results["num_prompts"] == 6
    joint = {row["system"]: row["joint"] for row in results["seeds"] if "minus" not in row}
    for scores in first["averages"]:
        assert joint[scores["system"]][0] == scores["joint"]  # the first seed has the same answers
    assert {row["grows"] for row in results["costs"]} == {"0", "1", "n", "2n"}
    weight = json.loads((steps / "chosen" / "choice.json").read_text())["weights"]["linear"]
    assert results["choices"][0]["weight"] == weight
    assert [(front["system"], len(front["points"])) for front in results["fronts"]] == [("sweep", 3), ("bone", 2)]
    assert {check["side"] for check in results["experts"]["alone"]} == {"concise", "informative"}
    assert results["experts"]["pairs"] == []  # there is only one dimension
    # the reward models judge: the scores of a valid answer towards two sides add up to 1
    base = next(scores for scores in results["averages"] if scores["system"] == "base")
    assert base["judged"]["informativeness"] == pytest.approx(0.5 * base["valid"])  # the mean over both combinations
    assert all("judged_joint" in scores for scores in results["averages"])
    text = (steps / "report" / "report.md").read_text()
    for heading in ("Each seed", "Method and weight", "Pareto fronts", "Does each expert work alone?"):
        assert f"## {heading}" in text
    assert (steps / "report" / "fronts.png").is_file()


@pytest.mark.parametrize(
    ("old", "new", "message", "place"),
    [
        ("policies: policies}", "policies: experts}", "whose models are for one side each", "steps.p-morl.policies"),
        (
            "experts: experts, weight: 0.6}\n  merged",
            "experts: reader, weight: 0.6}\n  merged",
            "for all combinations",
            "steps.mixed.experts",
        ),
        ("primary: [mixed, base]", "primary: [mixd, base]", "did you mean 'mixed'?", "steps.report.primary"),
        ("[base, prompted, p-morl", "[base, pool, p-morl", "name a step of the kind 'answers'", "steps.report.systems"),
        (
            ", experts: experts, weight: 0.6}\n  merged",
            ", experts: experts}\n  merged",
            "belongs together",
            "steps.mixed",
        ),
        (
            "pairs: policy_pairs, recipe: train.yaml",
            "method: reward, pairs: policy_pairs, recipe: reward.yaml",
            "trains reward models",
            "steps.p-morl.policies",
        ),
        ("targets: combinations", "combinations: [[concise]]", "the targets are sides", "policy_labels.combinations"),
        (
            "targets: combinations",
            "targets: combinations, combinations: [[brief]]",
            "brief is not a combination of this run",
            "policy_labels.combinations",
        ),
        (
            "primary: [mixed, base]",
            "primary: [mixed, base], combinations: [[informative], [terse]]",
            "terse is not a combination",
            "report.combinations",
        ),
        ("primary: [mixed, base]", "primary: [mixed, mixed]", "names 'mixed' twice", "report.primary"),
        ("systems: [base, prompted", "systems: [base, base, prompted", "'base' occurs twice", "report.systems"),
        (
            "base: {kind: answers, prompts: test.txt,",
            "base: {kind: answers, prompts: test.txt, num_prompts: 2,",
            "the step 'prompted' answers other prompts than 'base'",
            "report.systems",
        ),
        (
            "primary: [mixed, base]",
            "primary: [mixed, base], fronts: [way]}\n  way: {kind: sweep, prompts: validation.txt, experts: experts, "
            "weight: 0.6",
            "the step 'way' answers other prompts than 'base'",
            "report.fronts",
        ),
        (
            "primary: [mixed, base]",
            "primary: [mixed, base], fluency: pool",
            "the fluency gate needs 66",
            "report.fluency",
        ),
        ("weight: 0.6}\n  merged", "weight: 0}\n  merged", "the weight is 0", "steps.mixed"),
        (
            "experts: experts, weight: 0.6}\n  merged",
            "experts: experts, choice: c}\n  c: {kind: choose, experts: bones, prompts: validation.txt, "
            "weights: {linear: [1.0]}}\n  bones: {kind: train, pairs: pairs, recipe: train.yaml}\n  merged",
            "chooses a weight for the experts of 'bones', but these are of 'experts'",
            "mixed.choice",
        ),
        (
            "experts: experts, weight: 0.6}\n  merged",
            "experts: experts, choice: c, mixing: log_probs}\n  c: {kind: choose, experts: experts, "
            "prompts: validation.txt, weights: {ties: [1.0]}}\n  merged",
            "tries no weights for the method linear",
            "mixed.choice",
        ),
        (
            "systems: [base, prompted, p-morl, mixed, merged], primary: [mixed, base]",
            "systems: [mixed, base], primary: [mixed, base], reward_models: models}\n"
            "  models: {kind: train, method: reward, pairs: pairs, recipe: reward.yaml",
            "the first system, 'mixed', is not the base",
            "report.systems",
        ),
        ("primary: [mixed, base]", "primary: [mixed, base], fronts: [p-morl, prompted2]", "prompted2", "report.fronts"),
        ("primary: [mixed, base]", "primary: [mixed, base], reward_models: experts", "no reward models", "report"),
        ("targets: combinations", "beta: 0.5", "the targets are sides", "policy_labels.beta"),
        ("policies: policies}", "policies: policies, method: ties}", "`method` is for experts", "p-morl.method"),
        ("method: sft, pairs", "method: sft, targets: everyone, pairs", "has the targets of its pairs", "reader"),
        ("targets: combinations", "targets: everyone, judge: j.yaml", "contradict each other", "policy_labels.judge"),
        ("soups: soups}", "soups: soups, policies: policies}", "soups and policies are given", "steps.merged"),
        ("policies: policies}", "mixing: log_probs}", "mixed of experts", "steps.p-morl"),
        (
            "[mixed, base]",
            "[mixed, base], judges: {tone: {kind: length, low: 0, high: 9}}",
            "judges for tone",
            "steps.report.judges",
        ),
    ],
)
def test_a_faulty_system_is_named_with_its_line(
    old: str, new: str, message: str, place: str, *, psoups: Run, recipe: Path
) -> None:
    text = with_systems(recipe).read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    code, _, err = run(psoups, recipe, "--dry-run")
    assert code == 2
    assert message in err
    assert place in err


def test_every_shipped_run_has_an_order() -> None:
    paths = sorted((recipes_folder() / "runs").glob("*.yaml"))
    assert [path.name for path in paths] == ["tiny.yaml"]
    for path in paths:
        steps = in_order(steps_of(load(path, RunRecipe), device="cpu"))
        assert len(steps) == 1 + 3 * 6 + 8
        assert [step.name for step in steps if step.is_result] == [step.name for step in steps if "soups" in step.name]
    assert load(shipped_recipe("runs/tiny.yaml"), RunRecipe).base == "tiny"


def test_the_papers_comparison_has_its_trainings_and_one_result() -> None:
    recipe = load(shipped_recipe("paper/tiny.yaml"), RunRecipe)
    steps = in_order(steps_of(recipe, device="cpu"))
    trained = [step.name.partition("-")[0] for step in steps if type(step.work).__name__ == "Train"]
    assert {name: trained.count(name) for name in trained} == {
        "experts": 6,
        "policies": 8,
        "conditioned": 1,
        "multitask_policy": 1,
        "everyone": 1,
        "grpo_experts": 6,
        "grpo_everyone": 1,
        "reward_experts": 3,
        "bones": 3,
        "reward_models": 6,
    }
    assert [step.name for step in steps if step.is_result] == ["report"]
    names = ("train", "validation", "test", "judges")
    files = [(recipes_folder() / "prompts" / f"tiny-{name}.txt").read_text().splitlines() for name in names]
    assert [len(lines) for lines in files] == [256, 24, 48, 128]
    assert len({line for lines in files for line in lines}) == 256 + 24 + 48 + 128


def test_each_seed_has_its_own_steps_and_all_have_one_report() -> None:
    recipe = load(shipped_recipe("paper/tiny.yaml"), RunRecipe)
    one = {step.name: step for step in steps_of(recipe, device="cpu")}
    three = {step.name: step for step in in_order(steps_of(recipe.replaced(num_seeds=3), device="cpu"))}
    assert len(three) == 3 * (len(one) - 1) + 1
    for name, step in one.items():
        if name == "report":
            continue
        # the steps of one seed are kept when there are more
        assert three[name].settings == {**step.settings}
        assert three[f"seed2-{name}"].settings["seed"] == 2
        assert three[f"seed2-{name}"].needs == tuple(f"seed2-{need}" for need in step.needs)
    assert set(three["report"].needs) == {
        f"{prefix}{need}" for prefix in ("", "seed1-", "seed2-") for need in one["report"].needs
    }
