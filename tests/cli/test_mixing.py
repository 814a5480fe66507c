"""`psoups generate --profiles` and `psoups sweep`: many users in mixed batches, and the curve between two experts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.merging.writing.adapter import merge
from tests.mixing.worlds import write_experts

Run = Callable[..., "Done"]


class Done(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


PROFILES = [
    {"user": "u1", "weights": {"warm": 0.9, "cold": 0.4}},
    {"user": "u2", "weights": {"plain": -1.5}},
    {"user": "u3", "weights": {"warm": 2.0}},
]
PROMPTS = [{"prompt": "wash the kettle"}, {"prompt": "rub it dry", "user": "u2"}, {"prompt": "soap and warm water"}]


@pytest.fixture
def run(psoups: Callable[..., tuple[int, str, str]]) -> Run:
    return lambda *arguments: Done(*psoups(*arguments))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_experts(tmp_path / "experts")
    for name, rows in (("users.jsonl", PROFILES), ("prompts.jsonl", PROMPTS)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _arguments(world: Path, base: Path, *more: str) -> list[str]:
    files = ["--experts", str(world / "experts"), "--prompts", str(world / "prompts.jsonl")]
    return ["--base", str(base), *files, "--max-new-tokens", "6", "--device", "cpu", *more]


def _many(world: Path, base: Path, *more: str) -> list[str]:
    return ["generate", *_arguments(world, base, "--profiles", str(world / "users.jsonl"), "--greedy", *more)]


def test_every_prompt_is_answered_for_every_user(run: Run, world: Path, small_base: Path) -> None:
    out = world / "answers.jsonl"
    done = run(*_many(world, small_base, "--out", str(out), "--batch-size", "3"))
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [(row["prompt"], row["user"]) for row in rows]
    everyone = [profile["user"] for profile in PROFILES]
    first, second, third = (row["prompt"] for row in PROMPTS)
    assert asked == [*((first, user) for user in everyone), (second, "u2"), *((third, user) for user in everyone)]
    assert len({row["answer"] for row in rows[:3]}) == 3
    # each is what the soup that is merged for the user answers
    library = ExpertLibrary.open(world / "experts")
    for profile in PROFILES:
        folder = merge(library, Profile.model_validate_json(json.dumps(profile))).write(
            world / f"soup-{profile['user']}"
        )
        alone = run(
            "generate", first, "--base", str(small_base), "--adapter", str(folder), "--max-new-tokens", "6",
            "--greedy", "--device", "cpu", "--json",
        )  # fmt: skip
        wanted = next(row["answer"] for row in rows if (row["prompt"], row["user"]) == (first, profile["user"]))
        assert json.loads(alone.stdout)["answer"] == wanted
    again = run(*_many(world, small_base, "--out", str(out)))
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    to_stdout = run(*_many(world, small_base, "--batch-size", "2"))
    assert [json.loads(line) for line in to_stdout.stdout.splitlines()] == rows


@pytest.mark.slow
def test_a_killed_run_is_resumed(world: Path, small_base: Path) -> None:
    command = [sys.executable, "-m", "personalized_soups", *_many(world, small_base, "--batch-size", "1")]
    sampled = [*command[: command.index("--greedy")], "--temperature", "0.9", *command[command.index("--greedy") + 1 :]]
    whole, cut = world / "whole.jsonl", world / "cut.jsonl"
    subprocess.run([*sampled, "--out", str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*sampled, "--out", str(cut)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (cut.exists() and cut.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= cut.read_bytes().count(b"\n") < 7
    subprocess.run([*sampled, "--out", str(cut)], check=True, capture_output=True)
    assert cut.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in world.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--weights", "warm=1"], "options for one user and for many users are both given"),
        (["--adapter", "x"], "options for one user and for many users are both given"),
    ],
)
def test_contradicting_options_are_usage_errors(
    run: Run, world: Path, small_base: Path, change: list[str], message: str
) -> None:
    done = run(*_many(world, small_base, *change))
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


def test_errors_name_missing_and_invalid_files(run: Run, world: Path, small_base: Path) -> None:
    base = ["--base", str(small_base)]
    lacking = run("generate", *base, "--profiles", str(world / "users.jsonl"), "--experts", str(world / "experts"))
    assert lacking.exit_code == 2
    assert "add --prompts FILE" in lacking.stderr
    only_out = run("generate", "hello", *base, "--out", str(world / "x"))
    assert only_out.exit_code == 2
    cases: list[tuple[str, list[dict[str, Any]], str]] = [
        ("prompts.jsonl", [{"prompt": "a", "user": "u9"}], "no profile has the user 'u9'"),
        ("prompts.jsonl", [{"prompt": "a", "user": 3}], '"user" must be a string, but is 3'),
        ("users.jsonl", [PROFILES[0], PROFILES[0]], "two profiles have the user 'u1'"),
        ("users.jsonl", [{"user": "u1", "weights": {"wram": 1.0}}], "no expert is called 'wram'"),
        ("users.jsonl", [], "the file holds no profile"),
    ]
    for file, rows, message in cases:
        before = (world / file).read_text()
        (world / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = run(*_many(world, small_base))
        (world / file).write_text(before)
        assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


def test_a_sweep_leaves_answers_scores_and_a_picture(run: Run, world: Path, small_base: Path) -> None:
    pytest.importorskip("matplotlib")
    out = world / "swept"
    options = ["--steps", "5", "--temperature", "0", "--scale", "2", "--batch-size", "6"]
    command = ["sweep", "cold", "warm", *_arguments(world, small_base, "--out", str(out), *options)]
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl", "sweep.json", "sweep.png"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "sweep.json").read_text())
    assert [share for share, _ in results["points"]] == [0, 0.25, 0.5, 0.75, 1]
    assert (results["score"], results["num_prompts"]) == ("words", 3)
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in PROMPTS]
    library = ExpertLibrary.open(world / "experts")
    for at, weights in ((0, {"cold": 2.0}), (3, {"cold": 0.5, "warm": 1.5}), (4, {"warm": 2.0})):
        folder = merge(library, Profile(weights=weights)).write(world / f"step{at}")
        alone = run(
            "generate", PROMPTS[0]["prompt"], "--base", str(small_base), "--adapter", str(folder),
            "--max-new-tokens", "6", "--greedy", "--device", "cpu", "--json",
        )  # fmt: skip
        assert json.loads(alone.stdout)["answer"] == lines[0]["steps"][at]
    words = [len(line["steps"][2].split()) for line in lines]
    assert results["points"][2][1] == pytest.approx(sum(words) / 3)
    # finished, it is scored and drawn again without a model
    before = (out / "answers.jsonl").read_bytes()
    (out / "sweep.png").unlink()
    again = run(*command, "--base", str(small_base), "--json")
    assert json.loads(again.stdout) == results
    assert (out / "sweep.png").is_file()
    assert "sweeping" not in again.stderr
    assert (out / "answers.jsonl").read_bytes() == before
    for change, message in (
        (["--seed", "1"], "exists already"),
        (["--scale", "nan"], "the scale is nan"),
        (["--scale", "0"], "the scale is 0"),
    ):
        wrong = run(*command, *change)
        assert (wrong.exit_code, message in wrong.stderr) == (2, True), wrong.stderr
    # truncated answers of another run are not resumed
    (out / "answers.jsonl").write_bytes(before.splitlines(keepends=True)[0])
    cut = run(*command)
    assert (cut.exit_code, "exists already" in cut.stderr) == (2, True)
    (out / "answers.jsonl").unlink()
    again = run(*command)
    assert again.exit_code == 0, again.stderr
    assert (out / "answers.jsonl").read_bytes() == before
    for sides in (["cold", "cold"], ["cold", "wram"]):
        assert run("sweep", *sides, *command[3:]).exit_code == 2


def test_an_output_is_never_an_input(run: Run, world: Path, small_base: Path) -> None:
    for name in ("users.jsonl", "prompts.jsonl"):
        before = (world / name).read_bytes()
        done = run(*_many(world, small_base, "--out", str(world / name), "--overwrite"))
        assert (done.exit_code, "also an input file" in done.stderr) == (2, True)
        assert (world / name).read_bytes() == before


def test_a_run_that_cannot_start_keeps_the_old_answers(run: Run, world: Path, small_base: Path) -> None:
    out = world / "answers.jsonl"
    out.write_text("mine\n")
    done = run(*_many(world, world / "nowhere", "--out", str(out), "--overwrite"))
    assert done.exit_code == 2
    assert out.read_text() == "mine\n"


def test_a_prompt_longer_than_the_models_positions_is_rejected(run: Run, world: Path, small_base: Path) -> None:
    (world / "prompts.jsonl").write_text(json.dumps({"prompt": "soap and water " * 100}) + "\n")
    done = run(*_many(world, small_base))
    assert done.exit_code == 2
    assert "the model takes at most 255" in done.stderr


def test_a_prompt_that_the_template_rejects_is_reported_with_its_line_before_any_answer(
    run: Run, world: Path, small_base: Path
) -> None:
    base, out = world / "base", world / "answers.jsonl"
    shutil.copytree(small_base, base)
    template = (base / "chat_template.jinja").read_text()
    guard = "{% if 'soap' in messages[0].content %}{{ raise_exception('No!') }}{% endif %}"
    (base / "chat_template.jinja").write_text(guard + template)
    options = ("--out", str(world / "sweep"))
    commands = (_many(world, base, "--out", str(out)), ["sweep", "cold", "warm", *_arguments(world, base, *options)])
    for command in commands:
        done = run(*command)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "rejects the messages: No!" in done.stderr
        assert f"at: {world / 'prompts.jsonl'}:3" in done.stderr
    assert not list(world.rglob("answers.jsonl"))
