"""The whole study, small: real base, real trainings of two steps, real merges, a few prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from personalized_soups.adapters.provenance import read_expert_record, read_soup_record
from personalized_soups.declare.evaluation import PairsRecipe, SelectionRecipe, StudyRecipe, SweepRecipe
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import OutputExistsError
from personalized_soups.evaluation.results import Examples, Results
from personalized_soups.studies.quickstart import run_study
from personalized_soups.studies.study import Study
from personalized_soups.tiny import corpus
from personalized_soups.tiny.scorers import topic_of

pytestmark = pytest.mark.slow

SMALL = StudyRecipe(
    pairs=PairsRecipe(num_prompts=24, num_samples=3, min_gap=0.3, max_pairs=8),
    selection=SelectionRecipe(num_prompts=2, weights={"linear": (0.4, 0.6), "factor_average": (0.6,)}),
    sweep=SweepRecipe(num_prompts=3, num_steps=2),
    num_prompts=8,
    max_new_tokens=60,
)


class Stages:
    """Records the stages that ran and the units of work of each."""

    def __init__(self) -> None:
        self.done: dict[str, list[int]] = {}

    @contextmanager
    def __call__(self, title: str, total: int | None) -> Iterator[Stages]:
        self._title = title
        self.done[title] = []
        yield self

    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        self.done[self._title].append(done)


def small_study(seed: int = 0) -> Study:
    recipe = load(shipped_recipe("train/tiny.yaml"), TrainingRecipe)
    short = recipe.replaced(optimizer=recipe.optimizer.replaced(max_steps=2, batch_size=4))
    return Study(seed=seed, recipe=SMALL, training=short, device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, Examples]:
    out = tmp_path_factory.mktemp("study") / "run"
    results, examples = run_study(small_study(), out, stage=Stages())
    return out, results, examples


def test_the_results_have_every_figure(finished: tuple[Path, Results, Examples]) -> None:
    out, results, examples = finished
    assert json.loads((out / "results.json").read_text()) == results
    combinations = {tuple(row["sides"]) for row in results["combinations"]}
    assert len(combinations) == 8
    assert ("elementary", "concise", "friendly") in combinations
    assert len(results["combinations"]) == 16  # two methods
    for row in results["combinations"]:
        assert 0 <= row["win_rate_interval"][0] <= row["win_rate_vs_base"] <= row["win_rate_interval"][1] <= 1
        assert row["mean"] == pytest.approx(sum(row["per_dimension"].values()) / 3)
        assert row["joint"] <= row["valid"]
    assert set(results["sweeps"]) == {"expertise", "informativeness", "style"}
    assert [point[0] for point in results["sweeps"]["style"]] == [0.0, 1.0]
    assert results["num_prompts"] == 8
    assert {"pairs", "train", "choose", "merge", "evaluate"} == set(results["seconds"]) == set(results["memory"])
    # torch and transformers alone take more than 100 MiB, and this process is one of at least two.
    assert all(size > 200 * 2**20 for stage, size in results["memory"].items() if stage != "merge")
    assert {row["weight"] for row in results["combinations"] if row["method"] == "linear"} <= {0.4, 0.6}
    assert [each["name"] for each in examples["answers"]][:2] == ["base", "elementary + concise + friendly"]


def test_experts_and_merges_are_real(finished: tuple[Path, Results, Examples]) -> None:
    out, results, _ = finished
    for side in ("elementary", "expert", "concise", "informative", "friendly", "unfriendly"):
        record = read_expert_record(out / "experts" / side)
        assert record is not None
        assert record.side == side
        assert record.metrics["num_steps"] == 2
    soup = read_soup_record(out / "merged" / "linear" / "elementary+concise+friendly")
    assert soup is not None
    assert [expert.name for expert in soup.experts] == ["concise", "elementary", "friendly"]
    chosen = next(row["weight"] for row in results["methods"] if row["method"] == "linear")
    assert {expert.weight for expert in soup.experts} == {chosen}


def test_no_object_is_met_twice(finished: tuple[Path, Results, Examples]) -> None:
    """Training, choice of the scale, and scoring use three disjoint sets of objects."""
    out, _, examples = finished
    study = small_study()
    pairs = [json.loads(line) for path in (out / "pairs").glob("*.jsonl") for line in path.read_text().splitlines()]
    trained = {objects_of(row["prompt"][-1]["content"]) for row in pairs}
    chosen = {objects_of(prompt) for prompt in study.validation_prompts}
    scored = {objects_of(prompt) for prompt in study.test_prompts}
    based = {entry.topic.object for entry in corpus.documents(20_000, seed=0)}
    assert trained
    assert trained <= based  # experts train on objects that the base has seen
    assert not (trained | based) & chosen
    assert not (trained | based | chosen) & scored
    assert objects_of(examples["prompt"]) in scored


def test_a_finished_run_is_read_and_an_interrupted_one_goes_on(
    finished: tuple[Path, Results, Examples], tmp_path: Path
) -> None:
    import shutil

    out, results, _ = finished
    stages = Stages()
    assert run_study(small_study(), out, stage=stages)[0] == results
    assert stages.done == {}

    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "results.json").unlink()
    answers = copy / "answers" / "held-out.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])  # killed in the middle of a line
    shutil.rmtree(copy / "experts" / "friendly")
    again, _ = run_study(small_study(), copy, stage=stages)
    assert {**again, "seconds": {}, "memory": {}} == {**results, "seconds": {}, "memory": {}}
    assert stages.done["answering held-out prompts"] == [14, 15, 16, 17]
    assert stages.done["sweeping weights"] == [6]


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not a study's folder"):
        run_study(small_study(), tmp_path, stage=Stages(), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"

    run = tmp_path / "run"
    run.mkdir()
    (run / "study.json").write_text('{"seed": 7}\n')
    with pytest.raises(OutputExistsError, match=r"other settings: base, .*seed"):
        run_study(small_study(), run, stage=Stages())


def test_beginning_anew_removes_what_studies_write_and_nothing_else(tmp_path: Path) -> None:
    from personalized_soups.studies.folder import StudyFolder

    folder = StudyFolder(tmp_path)
    folder.begin({"seed": 0})
    folder.answers("held-out").add("base", ["one", "two"])
    (tmp_path / "notes.txt").write_text("mine")
    folder.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def objects_of(prompt: str) -> str:
    found = topic_of(prompt)
    assert found is not None
    return found[1]
