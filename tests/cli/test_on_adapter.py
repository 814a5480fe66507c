"""`--on` from pairs to a merged model: one SFT adapter below two experts, on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.errors import RunError
from personalized_soups.mixing import many_users
from personalized_soups.mixing.many_users import answer_many
from tests import oracles
from tests.base_adapters import trained_on, write_merged_base, write_sft
from tests.cli.conftest import Run
from tests.cli.train.test_train import DIMENSIONS, RECIPE
from tests.experts import write_expert

QUESTION = "how to wash the kettle?"

# PEFT still asks transformers by the old name; nothing of ours to change
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    return write_sft(tmp_path / "sft", size=0.4)


@pytest.fixture
def merged_base(small_base: Path, sft: Path, tmp_path: Path) -> Path:
    return write_merged_base(small_base, sft, tmp_path / "merged_base")


@pytest.fixture
def experts(tmp_path: Path, sft: Path) -> Path:
    for seed, name in enumerate(("cold", "warm")):
        trained_on(write_expert(tmp_path / "experts" / name, seed=seed), sft)
    return tmp_path / "experts"


def test_pairs_come_from_base_and_adapter(
    psoups: Run, small_base: Path, sft: Path, merged_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "dimensions.yaml").write_text(DIMENSIONS)
    (tmp_path / "prompts.txt").write_text("wash the kettle\nrub the towel\ndry the old soap\n")
    pools = {}
    bases: dict[str, list[Path | str]] = {
        "on": [small_base, "--on", sft],
        "merged": [merged_base],
        "bare": [small_base],
    }
    for name, base in bases.items():
        options = ["--dimensions", tmp_path / "dimensions.yaml", "--prompts", tmp_path / "prompts.txt"]
        options += ["--max-new-tokens", 24, "--min-gap", 0.05, "--num-samples", 6, "--device", "cpu", "--json"]
        pool, out = tmp_path / f"{name}.pool.jsonl", tmp_path / f"{name}.jsonl"
        code, _, err = psoups("pairs", "concise", "--base", *base, *options, "--pool", pool, "--out", out)
        assert code == 0, err
        pools[name] = pool.read_bytes()
    assert pools["on"] == pools["merged"]
    assert pools["on"] != pools["bare"]


def test_an_interrupted_sampling_resumes_only_with_its_adapter(
    psoups: Run, small_base: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from personalized_soups.training import resumable_sampling

    monkeypatch.setattr(resumable_sampling, "_BATCHES", 1)
    (tmp_path / "dimensions.yaml").write_text(DIMENSIONS)
    (tmp_path / "prompts.txt").write_text("wash the kettle\nrub the towel\ndry the old soap\n")
    options = [
        "pairs",
        "concise",
        "--base",
        small_base,
        "--dimensions",
        tmp_path / "dimensions.yaml",
        "--device",
        "cpu",
    ]
    options += ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "pairs.jsonl", "--batch-size", 2]
    options += ["--max-new-tokens", 24, "--min-gap", 0.05, "--num-samples", 2]
    assert psoups(*options, "--on", sft, "--min-gap", 1.0)[0] != 0  # no pair differs so much, so the answers are kept
    journal = tmp_path / ".pairs.jsonl.sampling"
    kept = journal.read_text().splitlines()
    journal.write_text("\n".join(kept[:2]) + "\n")
    code, _, err = psoups(*options)
    assert code == 2
    assert "settings differ in base" in err


def test_train_records_the_adapter(psoups: Run, small_base: Path, sft: Path, tmp_path: Path, pairs: Path) -> None:
    (tmp_path / "dimensions.yaml").write_text(DIMENSIONS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = ["train", "concise", "--base", small_base, "--on", sft, "--dimensions", tmp_path / "dimensions.yaml"]
    options += ["--recipe", tmp_path / "recipe.yaml", "--data", pairs, "--device", "cpu"]
    code, out, err = psoups(*options, "--out", tmp_path / "concise")
    assert code == 0, err
    digest = BaseAdapter.open(sft).digest
    assert f"sft ({digest[:12]})" in out
    code, out, _ = psoups("inspect", tmp_path / "concise", "--json")
    assert (json.loads(out)["on"], json.loads(out)["on_digest"]) == ("sft", digest)
    code, _, err = psoups("train", "--method", "p-dpo", *options[2:], "--out", tmp_path / "users")
    assert code == 2
    assert "--on is for experts" in err


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"how to rub {n}?", "chosen": "rub", "rejected": "rub the old towel dry"} for n in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_generate_answers_with_base_adapter_and_soup(
    *, psoups: Run, small_base: Path, sft: Path, merged_base: Path, experts: Path, tmp_path: Path
) -> None:
    """One user, an adapter, many users: the answers are those of the base into which PEFT merged the adapter."""
    bare = tmp_path / "bare"
    for seed, name in enumerate(("cold", "warm")):
        write_expert(bare / name, seed=seed)
    options = ["--greedy", "--max-new-tokens", 12, "--device", "cpu", "--dtype", "float32", "--same-base"]
    weights = ["--weights", "cold=0.6,warm=0.5"]

    def answer(*chosen: object) -> str:
        code, out, err = psoups("generate", QUESTION, *chosen, *options, "--json")
        assert code == 0, err
        return str(json.loads(out)["answer"])

    want = answer("--base", merged_base, "--experts", bare, *weights)
    assert answer("--base", small_base, "--on", sft, "--experts", experts, *weights) == want
    assert answer("--base", small_base, "--experts", bare, *weights) != want
    assert answer("--base", small_base, "--on", sft) == answer("--base", merged_base) != answer("--base", small_base)
    (tmp_path / "users.jsonl").write_text('{"user": "ada", "weights": {"cold": 0.6, "warm": 0.5}}\n')
    (tmp_path / "prompts.txt").write_text(QUESTION + "\n")
    many = ["--profiles", tmp_path / "users.jsonl", "--prompts", tmp_path / "prompts.txt", "--experts", experts]
    code, out, err = psoups("generate", "--base", small_base, "--on", sft, *many, *options)
    assert code == 0, err
    assert json.loads(out)["answer"] == want


def test_without_its_adapter_an_expert_is_refused_and_the_message_names_the_option(
    psoups: Run, small_base: Path, experts: Path, tmp_path: Path
) -> None:
    options = ["--base", small_base, "--device", "cpu"]
    for command in (
        ["generate", QUESTION, *options, "--experts", experts, "--weights", "cold=1"],
        ["generate", QUESTION, *options, "--adapter", experts / "cold"],
        ["merge", "--experts", experts, "--weights", "cold=1", "--into-base", small_base, "--out", tmp_path / "model"],
    ):
        code, _, err = psoups(*command)
        assert code == 2, command
        assert "give the folder of this adapter: --on sft" in err
    assert not (tmp_path / "model").exists()


def test_answers_of_many_users_resume_only_with_their_adapter(
    *, psoups: Run, small_base: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_expert(tmp_path / "experts" / "cold")  # no record, so it is accepted with every adapter
    (tmp_path / "users.jsonl").write_text('{"user": "ada", "weights": {"cold": 0.6}}\n')
    (tmp_path / "prompts.txt").write_text(f"{QUESTION}\nrub the towel\n")
    options = ["generate", "--base", small_base, "--profiles", tmp_path / "users.jsonl", "--batch-size", 1]
    options += ["--prompts", tmp_path / "prompts.txt", "--experts", tmp_path / "experts", "--device", "cpu"]
    options += ["--out", tmp_path / "out.jsonl", "--max-new-tokens", 2]

    def first_batch(*arguments: Any, **named: Any) -> Iterator[Any]:
        yield next(iter(answer_many(*arguments, **named)))
        raise RunError("interrupted", where="here", mend="run again")

    with monkeypatch.context() as patch:
        patch.setattr(many_users, "answer_many", first_batch)
        assert "interrupted" in psoups(*options, "--on", sft)[2]
    before = (tmp_path / "out.jsonl").read_bytes()
    for on in ([], ["--on", write_sft(tmp_path / "other", seed=5)]):
        code, _, err = psoups(*options, *on)
        assert code == 2
        assert "these settings differ: base" in err
    code, _, err = psoups(*options, "--on", sft)
    assert code == 0, err
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 2
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)


def test_merge_says_what_the_soup_needs(
    psoups: Run, small_base: Path, sft: Path, experts: Path, tmp_path: Path
) -> None:
    weights = ["--experts", experts, "--weights", "cold=0.6,warm=0.5"]
    code, out, err = psoups("merge", *weights, "--on", sft, "--out", tmp_path / "soup")
    assert code == 0, err
    assert "sft, included once: load the soup on the base alone" in " ".join(out.split())
    code, out, _ = psoups("merge", *weights, "--out", tmp_path / "alone")
    assert "sft, not included: load the soup with --on, on top of this adapter" in " ".join(out.split())
    got = oracles.deltas(tmp_path / "soup")
    for module, delta in oracles.soup([experts / "cold", experts / "warm", sft], [0.6, 0.5, 1.0]).items():
        assert oracles.relative_error(got[module], delta) < 1e-6
    code, out, _ = psoups("merge", *weights, "--on", sft, "--dry-run", "--json")
    assert json.loads(out)["includes_on"] is True
    code, out, _ = psoups("merge", *weights, "--on", sft, "--into-base", small_base, "--out", tmp_path / "model")
    assert code == 0
    for name, includes in (("soup", True), ("alone", False), ("model", True)):
        code, out, err = psoups("verify", tmp_path / name)
        assert code == 0, err
        code, out, _ = psoups("inspect", tmp_path / name, "--json")
        assert (json.loads(out)["on"], json.loads(out)["includes_on"]) == ("sft", includes)
    moved = sft.rename(tmp_path / "moved")
    code, _, err = psoups("verify", tmp_path / "soup")
    assert code == 2
    assert "--on FOLDER" in err
    assert psoups("verify", tmp_path / "soup", "--on", moved)[0] == 0


def test_doctor_examines_experts_on_an_adapter(psoups: Run, small_base: Path, sft: Path, experts: Path) -> None:
    code, out, err = psoups("doctor", experts, "--base", small_base, "--json")
    assert code == 0, err
    assert not [finding for finding in json.loads(out)["findings"] if finding["severity"] == "error"]
    trained_on(experts / "warm", None)
    code, out, _ = psoups("doctor", experts, "--base", small_base, "--json")
    assert code == 1
    assert "base adapter" in {finding["kind"] for finding in json.loads(out)["findings"]}
