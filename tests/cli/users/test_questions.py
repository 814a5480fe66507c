"""`psoups questions make` and `psoups questions show`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from personalized_soups import TINY_BASE
from personalized_soups.declare.evidence import Question
from personalized_soups.tiny.corpus import prompts
from personalized_soups.users.answers.known_users import fit_prior
from personalized_soups.users.answers.pool import PoolRecord, QuestionPool
from personalized_soups.users.answers.prior import GaussianPrior
from tests.cli.conftest import Run
from tests.experts import write_expert

# The query projections of the embedded base.
SHAPES = {f"model.layers.{layer}.self_attn.q_proj": (128, 128) for layer in range(4)}


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    for place, name in enumerate(("friendly", "unfriendly", "expert")):
        write_expert(tmp_path / "experts" / name, seed=place, shapes=SHAPES, alpha=0.2, base=str(TINY_BASE))
    return tmp_path / "experts"


def test_questions_of_the_embedded_base_need_no_prompts(psoups: Run, experts: Path, tmp_path: Path) -> None:
    out = tmp_path / "questions"
    arguments = (
        "--experts",
        experts,
        "--base",
        "tiny",
        "--num-questions",
        2,
        "--seed",
        2,
        "--max-new-tokens",
        128,
        "--out",
        out,
    )
    code, printed, told = psoups("questions", "make", *arguments, "--device", "cpu", "--json")
    assert (code, told) == (0, "")
    assert json.loads(printed) == {
        "folder": str(out),
        "questions": 2,
        "prompts": 1,
        "rewards": ["expert", "friendly", "unfriendly"],
    }
    pool = QuestionPool.open(out)
    assert set(pool.prompts) == set(prompts("validation", 1, 2))
    assert [expert.dimension for expert in pool.record.experts] == ["expertise", "style", "style"]
    assert pool.record.options["seed"] == 2

    code, printed, told = psoups("questions", "show", out, "--limit", 2, "--json")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert (code, told) == (0, "2 of 2 questions; rewards of expert, friendly, unfriendly\n")
    assert [row["id"] for row in rows] == ["q1", "q2"]
    assert rows[1]["a"] == pool.questions[1].a
    assert rows[1]["a minus b"] == dict(zip(pool.names, pool.differences[1].tolist(), strict=True))
    code, printed, _ = psoups("questions", "show", out, "--limit", 1)
    assert code == 0
    assert "a minus b" in printed

    code, _, told = psoups("questions", "make", *arguments)
    assert code == 2
    assert "--overwrite" in told


def test_other_bases_need_prompts(psoups: Run, experts: Path, small_base: Path, tmp_path: Path) -> None:
    code, _, told = psoups(
        "questions", "make", "--experts", experts, "--base", small_base, "--out", tmp_path / "questions"
    )
    assert code == 2
    assert "no prompts are given" in told
    assert "at: --prompts" in told
    assert not (tmp_path / "questions").exists()


def test_equal_answers_are_rejected_before_the_model_is_loaded(psoups: Run, experts: Path, tmp_path: Path) -> None:
    arguments = ("--experts", experts, "--base", "tiny", "--out", tmp_path / "questions")
    code, _, told = psoups("questions", "make", *arguments, "--temperature", 0)
    assert code == 2
    assert "give --temperature 1" in told


def test_a_folder_without_questions_is_named(psoups: Run, tmp_path: Path) -> None:
    code, _, told = psoups("questions", "show", tmp_path / "none")
    assert code == 2
    assert f"at: {tmp_path / 'none'}" in told


def test_the_prior_is_fitted_on_known_users(psoups: Run, tmp_path: Path) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)
    questions = tuple(Question(id=f"q{at}", prompt="How?", a="So.", b=f"No {at}.") for at in range(4))
    prior = GaussianPrior.ridge(2)
    pool = QuestionPool(PoolRecord(names=("x", "y"), digest="0"), questions, a, b, prior).write(tmp_path / "pool")
    rows = [{"user": user, "question": f"q{at}", "choice": "a"} for user in ("u1", "u2") for at in range(4)]
    known = tmp_path / "known.jsonl"
    known.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, printed, _ = psoups("questions", "fit", tmp_path / "pool", "--known", known, "--json")
    assert code == 0
    want = fit_prior([(pool.differences, np.ones(4))] * 2, prior)
    table = json.loads(printed)
    assert (table["users"], table["answers"]) == (2, 8)
    assert table["mean weights"] == dict(zip("xy", want.mean.tolist(), strict=True))
    assert table["standard deviations"]["y"] == pytest.approx(float(np.sqrt(want.covariance[1, 1])), rel=1e-12)
    assert (QuestionPool.open(tmp_path / "pool").prior.mean == want.mean).all()
    known.write_text("{}\n", encoding="utf-8")
    code, _, told = psoups("questions", "fit", tmp_path / "pool", "--known", known)
    assert code == 2
    assert f"at: {known}:1" in told
