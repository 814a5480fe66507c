"""Trainings in separate processes: killed and resumed, several at once, one in two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from personalized_soups.declare.loader import dump
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import InputError
from personalized_soups.training import checkpoints
from personalized_soups.training.parallel import ExpertJob, train_experts
from personalized_soups.training.processes import together
from personalized_soups.training.progress import Silent, StepReport

# Kills itself at the point that the last argument names: while step N is reported, or when checkpoint N is written but
# not yet marked.
_KILLED = """
import os, signal, sys
from personalized_soups.cli.train.bar_progress import BarProgress
from personalized_soups.training import checkpoints

place, _, steps = sys.argv.pop().partition(":")

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

mark = checkpoints.mark_complete
if place == "step":
    BarProgress.advance = lambda self, side, report: die() if report.step == int(steps) else None
if place == "unmarked":
    checkpoints.mark_complete = lambda folder: die() if folder.name == f"checkpoint-{steps}" else mark(folder)
from personalized_soups.cli.app import main
main()
"""


@pytest.fixture(scope="session")
def recipe_file(recipe: TrainingRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump(recipe))
    return path


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=280
    )


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, recipe_file: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options: list[str | Path] = [
        "train",
        "concise",
        "--base",
        small_base,
        "--data",
        pairs_file,
        "--recipe",
        recipe_file,
    ]
    options += ["--device", "cpu", "--out"]
    done = _run("-m", "personalized_soups", *options, whole)
    assert done.returncode == 0, done.stderr
    partial = checkpoints.partial_folder(parts)

    assert _run("-c", _KILLED, *options, parts, "unmarked:6").returncode == -9
    assert checkpoints.last_complete(partial) == partial / "checkpoint-3"
    assert (partial / "checkpoint-6").exists()
    assert not parts.exists()

    again = _run("-m", "personalized_soups", *options, parts)
    assert again.returncode == 2
    assert "--resume" in again.stderr

    assert _run("-c", _KILLED, *options, parts, "--resume", "step:8").returncode == -9
    assert checkpoints.last_complete(partial) == partial / "checkpoint-6"
    resumed = _run("-m", "personalized_soups", *options, parts, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["metrics"]["num_steps"] == 10
    assert _bytes(parts) == _bytes(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize(
    ("processes", "fault", "expected"),
    [
        ("2", None, 1),
        ("2", InputError("it is not there", where="x", mend="y"), 1),
        ("2", KeyboardInterrupt(), 0),
        ("1", None, 0),
    ],
)
def test_the_process_group_is_let_go_before_python_exits(
    monkeypatch: pytest.MonkeyPatch, processes: str, fault: BaseException | None, expected: int
) -> None:
    left = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: left.append(1))

    def run() -> None:
        with together():
            if fault is not None:
                raise fault

    if fault is None:
        run()
    else:
        with pytest.raises(type(fault)):
            run()
    assert len(left) == expected


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_train_one_expert(
    small_base: Path, pairs_file: Path, recipe_file: Path, tmp_path: Path, launcher: str
) -> None:
    # accelerate starts several processes without MPI only as --multi_gpu; --device cpu keeps them off any GPU
    launch = {
        "torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
        "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no --main_process_port 0",
    }[launcher].split()
    out = tmp_path / "concise"
    options: list[str | Path] = [
        "-m",
        "personalized_soups",
        "train",
        "concise",
        "--base",
        small_base,
        "--data",
        pairs_file,
    ]
    options += ["--recipe", recipe_file, "--device", "cpu", "--out", out, "--json"]
    done = _run("-m", *launch, *options)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one object: the second process prints nothing
    assert record["metrics"]["num_steps"] == 6  # 19 pairs, 2 processes of 4, 2 epochs
    assert sorted(_bytes(out)) == ["adapter_config.json", "adapter_model.safetensors", "expert.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["concise"]
    if launcher == "torchrun":
        again = _run("-m", *launch, *options)
        assert again.returncode != 0
        assert again.stderr.count("the output folder exists already") == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method", ["sft", "reward", "grpo"])
def test_two_processes_train_by_every_method(small_base: Path, pairs_file: Path, tmp_path: Path, method: str) -> None:
    losses = {
        "sft": "sft: {max_length: 64}",
        "reward": "reward: {max_length: 64}",
        "grpo": "grpo: {beta: 0.1, num_generations: 2, max_new_tokens: 8}",
    }
    rest = "lora: {rank: 4, alpha: 8}\noptimizer: {learning_rate: 1.0e-3, max_steps: 3, batch_size: 4}\n"
    (tmp_path / "recipe.yaml").write_text(f"{rest}{losses[method]}\n")
    (tmp_path / "prompts.txt").write_text("".join(f"how to wash the {number} towel?\n" for number in range(8)))
    pairs = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    completions = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in completions))
    data = {"sft": tmp_path / "sft.jsonl", "reward": pairs_file, "grpo": tmp_path / "prompts.txt"}[method]
    out = tmp_path / "concise"
    options: list[str | Path] = ["-m", "personalized_soups", "train", "concise", "--method", method, "--data", data]
    options += ["--base", small_base, "--recipe", tmp_path / "recipe.yaml", "--device", "cpu", "--out", out, "--json"]
    done = _run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one object: the second process prints nothing
    assert record["metrics"]["num_steps"] == 3
    assert {"adapter_config.json", "adapter_model.safetensors", "expert.json"} <= set(_bytes(out))


class _Heard(Silent):
    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.ended: list[str] = []

    def advance(self, side: str, report: StepReport) -> None:
        self.steps[side] = report.step

    def end(self, side: str) -> None:
        self.ended.append(side)


@pytest.mark.slow
def test_several_experts_in_two_processes_are_those_of_one(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    jobs = [ExpertJob(side, pairs_file, tmp_path / "two" / side) for side in ("concise", "informative", "expert")]
    heard = _Heard()
    folders = train_experts(jobs, base=small_base, recipe=recipe, device="cpu", workers=2, progress=heard)
    assert folders == [job.out for job in jobs]
    assert heard.steps == {"concise": 10, "informative": 10, "expert": 10}
    assert sorted(heard.ended) == ["concise", "expert", "informative"]
    alone = [ExpertJob(job.side, job.data, tmp_path / "one" / job.side) for job in jobs[:2]]
    train_experts(alone, base=small_base, recipe=recipe, device="cpu")
    for first, second in zip(alone, jobs, strict=False):
        assert _bytes(first.out) == _bytes(second.out)


@pytest.mark.slow
def test_the_fault_of_one_expert_stops_the_others_and_is_told(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    jobs = [ExpertJob(side, pairs_file, tmp_path / side) for side in ("concise", "informative")]
    jobs[0] = ExpertJob("concise", tmp_path / "none.jsonl", tmp_path / "concise")
    with pytest.raises(InputError, match="can't be read") as caught:
        train_experts(jobs, base=small_base, recipe=recipe, device="cpu", workers=2)
    assert caught.value.where == str(tmp_path / "none.jsonl")
    assert not (tmp_path / "concise").exists()


_SEVERAL = """
import sys
from pathlib import Path
from personalized_soups.declare.loader import load
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.training.parallel import ExpertJob, train_experts

if __name__ == "__main__":
    base, data, recipe, out = map(Path, sys.argv[1:])
    jobs = [ExpertJob(side, data, out / side) for side in ("concise", "informative")]
    try:
        train_experts(jobs, base=base, recipe=load(recipe, TrainingRecipe), device="cpu", workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_ctrl_c_while_the_workers_still_start_is_met_by_nobody_else(
    small_base: Path, pairs_file: Path, recipe_file: Path, tmp_path: Path
) -> None:
    script = tmp_path / "several.py"
    script.write_text(_SEVERAL)
    arguments = [sys.executable, script, small_base, pairs_file, recipe_file, tmp_path / "experts"]
    process = subprocess.Popen(
        [str(part) for part in arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        while len(children.read_text().split()) < 3:  # two workers and the resource tracker
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)  # the workers are importing now
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        _, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
    assert not (tmp_path / "experts").exists()


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_says_how_to_go_on(small_base: Path, pairs_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "long.yaml"
    recipe.write_text(
        "lora: {rank: 4, alpha: 8}\ndpo: {beta: 0.3, max_length: 64}\nsave_steps: 2\n"
        "optimizer: {learning_rate: 1.0e-3, max_steps: 100000, batch_size: 4}\n"
    )
    out = tmp_path / "concise"
    arguments = [
        sys.executable,
        "-m",
        "personalized_soups",
        "train",
        "concise",
        "--base",
        small_base,
        "--data",
        pairs_file,
    ]
    arguments += ["--recipe", recipe, "--device", "cpu", "--out", out]
    process = subprocess.Popen([str(part) for part in arguments], stderr=subprocess.PIPE, text=True)
    partial = checkpoints.partial_folder(out)
    try:
        while checkpoints.last_complete(partial) is None:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(2)
        _, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume" in err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not out.exists()
