"""`psoups train --method p-dpo`, and the answers of its users: one by one, in one batch, and with soups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.experts import write_expert

Run = Callable[..., tuple[int, str, str]]
PROMPT = "how to wash the kettle?"
RECIPE = """
lora: {rank: 4, alpha: 8}
dpo: {beta: 0.3, max_length: 64}
optimizer: {learning_rate: 0.02, max_steps: 2, batch_size: 2}
users: {tokens: 2, alpha: 0.9}
"""


def _write_pairs(path: Path) -> Path:
    rows = [
        {"prompt": [{"role": "user", "content": f"wash {thing}?"}]}
        | {"chosen": [{"role": "assistant", "content": "rub it"}]}
        | {"rejected": [{"role": "assistant", "content": "then dry the towel"}], "user": user}
        for thing, user in (("kettle", "ada"), ("soap", "bob"))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("users")
    (folder / "recipe.yaml").write_text(RECIPE)
    _write_pairs(folder / "pairs.jsonl")
    write_expert(folder / "experts" / "warm", seed=3)
    return folder


def _train(folder: Path, base: Path, out: str, *more: object) -> list[object]:
    options = ["train", "--base", base, "--data", folder / "pairs.jsonl", "--recipe", folder / "recipe.yaml"]
    return [*options, "--device", "cpu", "--out", folder / out, *more]


@pytest.fixture
def people(folder: Path, small_base: Path, psoups: Run) -> Path:
    if not (folder / "people").exists():
        code, out, err = psoups(*_train(folder, small_base, "people", "--method", "p-dpo", "--user-tokens", 3))
        assert code == 0, err
        assert "user model" in out
        assert "individual" in out
        assert "training people: 2/2" in err
    return folder / "people"


def _ask(base: Path, *more: object) -> list[object]:
    return ["generate", "--base", base, "--device", "cpu", "--max-new-tokens", 12, "--greedy", "--same-base", *more]


def test_options_take_the_place_of_the_recipes_values(
    people: Path, folder: Path, small_base: Path, psoups: Run
) -> None:
    record = json.loads((people / "user_model.json").read_text())
    assert (record["kind"], record["num_tokens"], record["users"]) == ("individual", 3, ["ada", "bob"])
    assert json.loads((people / "expert.json").read_text())["recipe"]["users"]["alpha"] == 0.9
    more = ["--method", "p-dpo", "--user-model", "cluster", "--clusters", 2, "--alpha", 0.25, "--json"]
    code, out, err = psoups(*_train(folder, small_base, "clusters", *more))
    assert code == 0, err
    users = json.loads(out)["recipe"]["users"]
    assert users == {"model": "cluster", "tokens": 2, "clusters": 2, "alpha": 0.25, "learning_rate_factor": 10.0}


def test_each_user_of_a_batch_gets_the_answer_alone(
    people: Path, folder: Path, small_base: Path, psoups: Run, tmp_path: Path
) -> None:
    answers = {}
    for user in ("ada", "bob", "stranger"):
        code, out, err = psoups(*_ask(small_base, "--user-model", people, "--user", user, PROMPT))
        assert (code, err) == (0, "")
        answers[user] = out.removesuffix("\n")
    code, generic, _ = psoups(*_ask(small_base, "--user-model", people, "--json", PROMPT))
    assert json.loads(generic) == {"prompt": PROMPT, "answer": answers["stranger"], "seed": 0, "user": None}
    _, adapter, _ = psoups(*_ask(small_base, "--adapter", people, PROMPT))
    assert adapter.removesuffix("\n") not in answers.values()  # soft tokens matter
    prompts = tmp_path / "prompts.jsonl"
    rows: list[dict[str, str]] = [{"prompt": PROMPT, "user": user} for user in answers]
    prompts.write_text("\n".join(map(json.dumps, [*rows, {"prompt": PROMPT}])))
    code, out, err = psoups(*_ask(small_base, "--user-model", people, "--prompts", prompts))
    assert code == 0, err
    got = [json.loads(line) for line in out.splitlines()]
    assert [(row["user"], row["answer"]) for row in got] == [*answers.items(), (None, answers["stranger"])]
    profiles = tmp_path / "profiles.jsonl"
    profiles.write_text('{"user": "ada", "weights": {"warm": 0.5}}\n{"user": "eve", "weights": {"warm": 1.0}}\n')
    prompts.write_text(json.dumps({"prompt": PROMPT}))
    soups = ["--experts", folder / "experts", "--profiles", profiles]
    written = tmp_path / "answers.jsonl"
    code, _, err = psoups(*_ask(small_base, "--user-model", people, "--prompts", prompts, *soups, "--out", written))
    assert code == 0, err
    both = [row for line in written.read_text().splitlines() if "answer" in (row := json.loads(line))]
    for user, weight, row in zip(("ada", "eve"), (0.5, 1.0), both, strict=True):
        one = ["--experts", folder / "experts", "--weights", f"warm={weight}", "--user", user, PROMPT]
        _, alone, _ = psoups(*_ask(small_base, "--user-model", people, *one))
        assert (row["user"], row["answer"]) == (user, alone.removesuffix("\n"))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["concise", "--user-model", "cluster"], "--user-model"),
        (["concise", "--alpha", "0.5", "--user-tokens", "2"], "--user-tokens, --alpha"),
        (["--method", "dpo"], "SIDE"),
        (["--method", "ppo"], "--method"),
        (["concise", "--method", "p-dpo"], "SIDE"),
        (["concise", "--method", "p-dpo", "--dimensions", "d.yaml"], "SIDE, --dimensions"),
        (["--method", "p-dpo", "--user-model", "personal"], "--user-model"),
        (["--method", "p-dpo", "--clusters", "3"], "--clusters"),
    ],
)
def test_arguments_of_another_method_are_usage_errors(
    folder: Path, small_base: Path, psoups: Run, options: list[str], where: str
) -> None:
    code, out, err = psoups(*_train(folder, small_base, "nothing", *options))
    assert (code, out) == (2, "")
    assert f"at: {where}\n" in err
    assert "mend: " in err
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--user", "ada"], "--user"),
        (["--user-model", "x", "--adapter", "x"], "--adapter, --user-model"),
        (["--user-model", "no_such_folder"], "no_such_folder"),
        (["--user-model", "x", "--experts", "e"], "--profile, --weights"),
    ],
)
def test_options_that_contradict_are_usage_errors(
    small_base: Path, psoups: Run, options: list[str], where: str
) -> None:
    code, out, err = psoups("generate", "--base", small_base, *options, PROMPT)
    assert (code, out) == (2, "")
    assert f"at: {where}\n" in err
