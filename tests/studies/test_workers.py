"""How jobs are packed into batches, and that a mixed batch gives the answers of merged models."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.launching.processes import Report
from personalized_soups.merging.writing.adapter import merge
from personalized_soups.studies import workers
from personalized_soups.studies.workers import AnswerJob, AnswerTask, tasks_of
from personalized_soups.tiny import BASE_FOLDER, corpus
from tests import oracles
from tests.experts import write_expert

PROMPTS = tuple(corpus.prompts("held-out", 3, seed=1))
ignore: Report = lambda _: None  # noqa: E731


def job(name: str, soup: Path | Profile | None = None, *, num_prompts: int = 3, seed: int = 0) -> AnswerJob:
    return AnswerJob(
        name=name,
        base=str(BASE_FOLDER),
        soup=soup,
        experts=Path("experts"),
        prompts=(PROMPTS * num_prompts)[:num_prompts],
        temperature=0.01,
        max_new_tokens=12,
        seed=seed,
        device="cpu",
    )


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three random experts of the embedded base, strong enough to change every answer."""
    folder = tmp_path_factory.mktemp("library") / "experts"
    (weights,) = BASE_FOLDER.glob("*.safetensors")
    shapes = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, (_, shape, _) in oracles.raw_tensors(weights).items()
        if name.endswith("proj.weight")
    }
    for seed, name in enumerate(("warm", "plain", "cold"), start=1):
        write_expert(folder / name, seed=seed, rank=4, alpha=6, shapes=shapes)
    return folder


def names(tasks: list[AnswerTask]) -> list[list[str]]:
    return [[each.name for each in task.jobs] for task in tasks]


def test_consecutive_jobs_share_a_batch_as_long_as_they_fit() -> None:
    jobs = [job(str(at), num_prompts=count) for at, count in enumerate((3, 3, 4, 1, 12, 2, 10))]
    assert names(tasks_of(jobs, 10)) == [["0", "1", "2"], ["3"], ["4"], ["5"], ["6"]]
    assert names(tasks_of(jobs, 6)) == [["0", "1"], ["2", "3"], ["4"], ["5"], ["6"]]
    assert [task.batch_size for task in tasks_of(jobs, 6)] == [6] * 5


def test_jobs_with_other_sampling_and_jobs_without_batch_size_are_tasks_of_their_own() -> None:
    jobs = [job("a"), job("b"), job("c", seed=1), job("d", seed=1)]
    assert names(tasks_of(jobs, 100)) == [["a", "b"], ["c", "d"]]
    assert names(tasks_of(jobs, None)) == [["a"], ["b"], ["c"], ["d"]]
    assert tasks_of([], 10) == []


def test_a_mixed_batch_answers_like_merged_models(experts: Path, tmp_path: Path) -> None:
    """The oracle is each model alone, with its soup in its weights."""
    library = ExpertLibrary.open(experts)
    averaged = Profile(method="factor_average", weights={"warm": 2.0, "plain": 2.0})
    soups: dict[str, Path | Profile | None] = {
        "base": None,
        "linear": Profile(weights={"warm": 0.8, "cold": 0.5}),
        "single": Profile(weights={"plain": 1.0}),
        "averaged": averaged,
        "folder": merge(library, Profile(weights={"warm": -0.7})).write(tmp_path / "folder"),
    }
    from dataclasses import replace

    jobs = [replace(job(name, soup), experts=experts) for name, soup in soups.items()]
    (task,) = tasks_of(jobs, 100)
    mixed = workers._answer(task, ignore)
    alone = [workers._answer(AnswerTask((each,), None), ignore).answers[0] for each in jobs]
    assert list(mixed.answers) == alone
    assert len({tuple(answers) for answers in alone}) == len(jobs)  # every soup has its own answers
    assert all(len(answers) == len(PROMPTS) for answers in alone)
    assert mixed.memory > 100 * 2**20  # torch alone takes more


def test_a_batch_of_the_base_alone_needs_no_experts() -> None:
    found = workers._answer(AnswerTask((job("a"), job("b", num_prompts=1)), 2), ignore)
    assert found.answers[0][0] == found.answers[1][0]  # the same prompt, place and seed
    assert [len(answers) for answers in found.answers] == [3, 1]
