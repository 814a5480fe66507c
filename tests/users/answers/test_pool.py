"""Question pools: written and read again, damaged files, and experts that changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups.declare.evidence import Question
from personalized_soups.errors import FileFormatError, InputError, OutputExistsError, UsageError
from personalized_soups.users.answers.pool import PooledExpert, PoolRecord, QuestionPool
from personalized_soups.users.answers.prior import GaussianPrior


def new_pool(count: int = 3, **fields: Any) -> QuestionPool:
    experts = tuple(PooledExpert(name=name, digest=name * 2, side=name, dimension="style") for name in ("cold", "warm"))
    record = PoolRecord(names=("cold", "warm"), digest="d1", experts=experts, base="a base", **fields)
    questions = tuple(Question(id=f"q{at}", prompt=f"é {at}\u2028", a="Dust it.", b=f"No {at}.") for at in range(count))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, count, 2)).astype(np.float32)
    return QuestionPool(record, questions, a, b, GaussianPrior(np.array([0.5, -1]), np.array([[2.0, 0.5], [0.5, 1.0]])))


def test_a_pool_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = new_pool(options={"seed": 3}).write(tmp_path / "pool")
    read = QuestionPool.open(tmp_path / "pool")
    assert written.folder == read.folder == tmp_path / "pool"
    assert read.record == written.record
    assert read.questions == written.questions
    assert (read.a == written.a).all()
    assert (read.b == written.b).all()
    assert (read.prior.mean == written.prior.mean).all()
    assert (read.prior.covariance == written.prior.covariance).all()
    assert read.record.files == ("pool.json", "questions.jsonl", "features.safetensors")
    assert {path.name for path in (tmp_path / "pool").iterdir()} == set(read.record.files)
    assert read.names == ("cold", "warm")
    assert read.index("q2") == 2
    assert len(read) == 3


def test_differences_are_computed_in_float64() -> None:
    pool = new_pool(1)
    want = [[float(a) - float(b) for a, b in zip(pool.a[0], pool.b[0], strict=True)]]
    assert pool.differences.tolist() == want
    assert pool.differences.dtype == np.float64


def test_opening_a_pool_loads_no_torch(tmp_path: Path) -> None:
    new_pool().write(tmp_path / "pool")
    code = (
        "import sys; from personalized_soups.users.answers.pool import QuestionPool; "
        "pool = QuestionPool.open(sys.argv[1]); print(len(pool), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "pool"], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["3", "False"]


def test_a_pool_replaces_only_a_pool(tmp_path: Path) -> None:
    pool = new_pool()
    pool.write(tmp_path / "pool")
    with pytest.raises(OutputExistsError):
        pool.write(tmp_path / "pool")
    new_pool(2).write(tmp_path / "pool", overwrite=True)
    assert len(QuestionPool.open(tmp_path / "pool")) == 2
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    with pytest.raises(OutputExistsError, match="files that psoups did not write"):
        pool.write(tmp_path / "photos", overwrite=True)


def test_a_pool_without_a_prior_has_a_standard_normal_prior(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    pool = new_pool().write(tmp_path / "pool")
    save_file({"a": pool.a, "b": pool.b}, tmp_path / "pool" / "features.safetensors")
    prior = QuestionPool.open(tmp_path / "pool").prior
    assert prior.mean.tolist() == [0, 0]
    assert prior.covariance.tolist() == [[1, 0], [0, 1]]


def test_unchanged_experts_pass_and_changed_experts_do_not(tmp_path: Path) -> None:
    pool = new_pool().write(tmp_path / "pool")
    pool.check_experts({"cold": "coldcold", "warm": "warmwarm", "new": "x"})
    with pytest.raises(UsageError, match=r"questions were made: cold changed\n") as caught:
        pool.check_experts({"cold": "x", "warm": "warmwarm"})
    with pytest.raises(UsageError, match="cold changed; warm missing"):
        pool.check_experts({"cold": "x"})
    assert "make the questions again" in caught.value.mend


def test_another_prior_is_kept_with_its_origin(tmp_path: Path) -> None:
    pool = new_pool().with_prior(GaussianPrior.ridge(2, penalty=4), kind="ridge", penalty=4.0)
    read = pool.write(tmp_path / "pool").open(tmp_path / "pool")
    assert read.prior.covariance.tolist() == [[0.25, 0], [0, 0.25]]
    assert read.record.prior == {"kind": "ridge", "penalty": 4.0}


def test_an_unknown_question_is_named(tmp_path: Path) -> None:
    pool = new_pool().write(tmp_path / "pool")
    with pytest.raises(UsageError, match="no question has the id 'q9'") as caught:
        pool.index("q9")
    assert caught.value.where == str(tmp_path / "pool")


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        QuestionPool.open(tmp_path / "pool")
    assert caught.value.where == str(tmp_path / "pool")
    for name in ("pool.json", "questions.jsonl", "features.safetensors"):
        new_pool().write(tmp_path / "pool", overwrite=True)
        (tmp_path / "pool" / name).unlink()
        with pytest.raises(InputError, match="cannot be read") as caught:
            QuestionPool.open(tmp_path / "pool")
        assert caught.value.where == str(tmp_path / "pool" / name)
        new_pool().write(tmp_path / name)
        (tmp_path / "pool" / name).write_bytes((tmp_path / name / name).read_bytes())


def damage(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("pool.json", '"digest"', '"digits"', "the key 'digest' is invalid"),
        ("pool.json", '"format_version": 1', '"format_version": 2', "the key 'format_version' is invalid"),
        ("pool.json", "{", "", "is not JSON"),
        ("questions.jsonl", '"id"', '"it"', "the line is not a question"),
        ("questions.jsonl", '"q1"', '"q0"', "two questions have the same id"),
        ("questions.jsonl", "Dust it.", "No 0.", "both answers are the same text"),
    ],
)
def test_damaged_texts_are_named(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    new_pool().write(tmp_path / "pool")
    damage(tmp_path / "pool" / name, old, new)
    with pytest.raises(FileFormatError, match=message):
        QuestionPool.open(tmp_path / "pool")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.zeros((2, 2), np.float32)}, "a is float32"),
        ({"b": np.zeros((3, 2), np.float64)}, "b is float64"),
        ({"b": np.full((3, 2), np.nan, np.float32)}, "not finite"),
        ({"prior_mean": np.zeros(3), "prior_covariance": np.eye(3)}, "the prior is of 3 weights"),
        ({"prior_covariance": -np.eye(2)}, "must be positive definite"),
        ({"a": None}, "no tensor a"),
    ],
)
def test_damaged_features_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from safetensors.numpy import load_file, save_file

    new_pool().write(tmp_path / "pool")
    path = tmp_path / "pool" / "features.safetensors"
    tensors = load_file(path) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(FileFormatError, match=message) as caught:
        QuestionPool.open(tmp_path / "pool")
    assert caught.value.where == str(path)


def test_a_truncated_file_of_features_is_named(tmp_path: Path) -> None:
    new_pool().write(tmp_path / "pool")
    path = tmp_path / "pool" / "features.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        QuestionPool.open(tmp_path / "pool")


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    new_pool(versions={"numpy": "2.0"}).write(tmp_path / "pool")
    table = json.loads((tmp_path / "pool" / "pool.json").read_text())
    assert table["experts"][1] == {
        "name": "warm",
        "digest": "warmwarm",
        "side": "warm",
        "dimension": "style",
        "beta": 1.0,
    }
    assert table["versions"] == {"numpy": "2.0"}
