from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
DIMENSIONS = """
dimensions:
  informativeness:
    about: How much is said.
    scorer: {kind: length, low: 2, high: 20}
    sides:
      concise: {instruction: Be brief., end: low}
      informative: {label: P2B, instruction: Tell all.}
"""
RECIPE = """
lora: {rank: 4, alpha: 8}
dpo: {beta: 0.3, max_length: 96}
optimizer: {learning_rate: 1.0e-3, max_steps: 2, batch_size: 2}
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "dimensions.yaml").write_text(DIMENSIONS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "prompts.txt").write_text("wash the kettle\nrub the towel\ndry the old soap\n")
    return tmp_path


def _pairs(files: Path, base: Path, *more: object) -> list[object]:
    options = ["pairs", "concise", "--base", base, "--dimensions", files / "dimensions.yaml", "--device", "cpu"]
    options += ["--max-new-tokens", 24, "--min-gap", 0.05, "--num-samples", 6]
    return [*options, "--out", files / "pairs.jsonl", *more]


def _train(files: Path, base: Path, *more: object) -> list[object]:
    options = ["train", "concise", "--base", base, "--dimensions", files / "dimensions.yaml", "--device", "cpu"]
    return [*options, "--recipe", files / "recipe.yaml", "--data", files / "pairs.jsonl", "--out", files / "e", *more]


def test_pairs_and_train_make_an_expert_of_a_base(psoups: Run, small_base: Path, files: Path) -> None:
    code, out, err = psoups(*_pairs(files, small_base, "--prompts", files / "prompts.txt", "--json"))
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["pairs"] == len((files / "pairs.jsonl").read_text().splitlines()) > 0
    code, out, err = psoups(*_train(files, small_base))
    assert code == 0
    assert "informativeness" in out  # the record, as a table
    assert "training concise: 2/2" in err  # the last line of the bar, where there is no terminal
    assert "loss" in err
    assert (files / "e/adapter_model.safetensors").is_file()
    code, out, _ = psoups(*_train(files, small_base, "--resume", "--json"))
    assert code == 0
    assert json.loads(out)["metrics"]["num_steps"] == 2
    code, _, err = psoups(*_train(files, small_base))
    assert code == 2
    assert "exists already" in err


def test_a_pool_serves_both_sides(psoups: Run, small_base: Path, files: Path) -> None:
    pool = ("--pool", files / "pool.jsonl")
    assert psoups(*_pairs(files, small_base, "--prompts", files / "prompts.txt", *pool))[0] == 0
    first = (files / "pairs.jsonl").read_text()
    code, _, err = psoups(*_pairs(files, small_base, *pool))
    assert code == 2
    assert "--overwrite" in err
    assert psoups(*_pairs(files, small_base, *pool, "--overwrite"))[0] == 0
    assert (files / "pairs.jsonl").read_text() == first


def test_a_pool_of_other_prompts_is_rejected(psoups: Run, small_base: Path, files: Path) -> None:
    (files / "pool.jsonl").write_text('{"prompt": "else", "answers": ["a", "b c d e f g h i j k l m n o p"]}\n')
    pool = ("--pool", files / "pool.jsonl")
    code, _, err = psoups(*_pairs(files, small_base, "--prompts", files / "prompts.txt", *pool))
    assert code == 2
    assert "the prompts in the pool differ" in err
    assert psoups(*_pairs(files, small_base, *pool))[0] == 0


def test_answers_are_kept_until_the_pairs_are_written(psoups: Run, small_base: Path, files: Path) -> None:
    """A sampling that leads to no pair is not repeated for another gap."""
    prompts = ("--prompts", files / "prompts.txt")
    code, _, err = psoups(*_pairs(files, small_base, *prompts, "--min-gap", "1"))
    assert code == 2
    assert "no two answers differ by 1" in err
    kept = files / ".pairs.jsonl.sampling"
    content = kept.read_text()
    kept.write_text(content.replace('"answers": ["', '"answers": ["kept '))
    assert psoups(*_pairs(files, small_base, *prompts))[0] == 0
    assert '"kept ' in (files / "pairs.jsonl").read_text()
    assert not kept.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-gap", "0"], "--min-gap"),
        (["--dtype", "int8"], "--dtype"),
        (["--temperature", "inf"], "--temperature"),
        (["--seed", str(2**32)], "--seed"),
        (["--pool", "no_such_folder/pool.jsonl"], "no_such_folder"),
        (["--prompts", "none.txt"], "none.txt"),
        ([], "--prompts"),
    ],
)
def test_bad_options_of_pairs(psoups: Run, small_base: Path, files: Path, options: list[str], message: str) -> None:
    given = options if not options or "--prompts" in options else [*options, "--prompts", str(files / "prompts.txt")]
    code, out, err = psoups(*_pairs(files, small_base, *given))
    assert (code, out) == (2, "")
    assert message in err
    assert "mend: " in err or "--seed" in options  # the parser's own words
    assert "Traceback" not in err
    assert not (files / "pairs.jsonl").exists()


def test_bad_input_of_train(psoups: Run, small_base: Path, files: Path) -> None:
    (files / "pairs.jsonl").write_bytes('{"prompt": "How?", "chosen": "Caf\u00e9"'.encode("latin1"))
    code, out, err = psoups(*_train(files, small_base))
    assert (code, out) == (2, "")
    assert f"at: {files / 'pairs.jsonl'}:1" in err
    assert "not UTF-8" in err
    unknown = _train(files, small_base)
    unknown[1] = "concice"
    code, _, err = psoups(*unknown)
    assert code == 2
    assert "did you mean 'concise'?" in err
    (files / "recipe.yaml").write_text(RECIPE.replace("rank", "ranc"))
    code, _, err = psoups(*_train(files, small_base))
    assert code == 2
    assert "did you mean 'rank'?" in err
    assert not (files / "e").exists()


def test_only_the_first_process_of_a_training_reports_errors(
    psoups: Run, small_base: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    code, out, err = psoups(*_train(files, small_base))  # there are no pairs
    assert (code, out, err) == (2, "", "")


def _refusing(base: Path, folder: Path) -> Path:
    """Return a copy of a base whose chat template refuses some messages."""
    shutil.copytree(base, folder)
    template = (folder / "chat_template.jinja").read_text()
    bad = (
        "{% if messages[0].role == 'system' or 'soap' in messages[0].content %}{{ raise_exception('No!') }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(bad + template)
    return folder


def test_messages_that_a_chat_template_rejects_are_reported_with_file_and_line(
    psoups: Run, small_base: Path, files: Path
) -> None:
    base = _refusing(small_base, files / "base")
    code, out, err = psoups(*_pairs(files, base, "--prompts", files / "prompts.txt"))
    assert (code, out) == (2, "")
    assert "rejects the messages: No!" in err
    assert f"at: {files / 'prompts.txt'}:3" in err
    pair = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "wash"}],
        "chosen": [{"role": "assistant", "content": "rub"}],
        "rejected": [{"role": "assistant", "content": "dry"}],
    }
    (files / "pairs.jsonl").write_text("\n" + json.dumps(pair) + "\n")
    code, out, err = psoups(*_train(files, base))
    assert (code, out) == (2, "")
    assert "rejects the messages: No!" in err
    assert f"at: {files / 'pairs.jsonl'}:2" in err
    assert not [path for path in files.iterdir() if path.name.startswith(".")]


def test_truncated_and_dropped_pairs_are_reported_on_stderr(psoups: Run, small_base: Path, files: Path) -> None:
    long = "rub the kettle " * 60
    rows = [{"prompt": "wash", "chosen": long + "so", "rejected": long + "dry"}]
    rows += [{"prompt": "wash", "chosen": " it", "rejected": long}] * 2
    (files / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = psoups(*_train(files, small_base))
    assert code == 0
    message = " ".join(err.split())  # the terminal's width breaks lines
    assert "1 pair is left out: once cut to dpo.max_length (96) both answers are equal" in message
    assert "2 of 4 answers are longer than dpo.max_length (96) and lose their end" in message


REWARD_RECIPE = """
lora: {rank: 4, alpha: 8}
reward: {max_length: 96}
optimizer: {learning_rate: 1.0e-3, max_steps: 2, batch_size: 2}
"""


def test_a_reward_model_of_the_same_pairs(psoups: Run, small_base: Path, files: Path) -> None:
    assert psoups(*_pairs(files, small_base, "--prompts", files / "prompts.txt"))[0] == 0
    (files / "reward.yaml").write_text(REWARD_RECIPE)
    code, _, err = psoups(*_train(files, small_base, "--method", "reward"))
    assert code == 2  # the recipe of an expert
    assert "recipe.yaml" in err
    arguments = _train(files, small_base, "--method", "reward", "--recipe", files / "reward.yaml", "--json")
    code, out, _ = psoups(*arguments)
    assert code == 0
    record = json.loads(out)
    assert (record["method"], record["side"]) == ("reward", "concise")
    assert (files / "e" / "adapter_model.safetensors").is_file()
    (files / "judge.yaml").write_text("judge: {kind: reward_model, model: e}\n")
    people = {"prompt": "Why?", "first": "wash the kettle", "second": "rub it dry", "preferred": "first"}
    (files / "people.jsonl").write_text(json.dumps(people) + "\n")
    code, out, _ = psoups("judge", "agreement", files / "people.jsonl", "--judge", files / "judge.yaml", "--json")
    assert code == 0
    assert json.loads(out)["judge"]["model"] == str(files / "e")
    code, _, err = psoups(*_train(files, small_base, "--method", "reward", "--on", files / "e"))
    assert code == 2
    assert "--on is for experts" in err


GRPO_RECIPE = """
lora: {rank: 4, alpha: 8}
grpo: {num_generations: 2, max_new_tokens: 8}
optimizer: {learning_rate: 1.0e-3, max_steps: 2, batch_size: 4}
"""


def test_a_policy_is_trained_on_rewards(psoups: Run, small_base: Path, files: Path) -> None:
    (files / "grpo.yaml").write_text(GRPO_RECIPE)
    given = ["--method", "grpo", "--recipe", files / "grpo.yaml", "--data", files / "prompts.txt", "--json"]
    code, out, err = psoups(*_train(files, small_base, *given))
    assert code == 0
    record = json.loads(out)
    assert (record["method"], record["side"]) == ("grpo", "concise")
    assert "reward" in record["metrics"]
    assert "training concise: 2/2" in err or "training" not in err  # quiet with --json
    mixed = ["train", "both", "--base", small_base, "--dimensions", files / "dimensions.yaml", "--device", "cpu"]
    mixed += [*given, "--out", files / "both"]
    code, out, _ = psoups(*mixed, "--reward", "concise=0.5,informative=0.5")
    assert code == 0
    assert json.loads(out)["recipe"]["rewards"] == {"concise": 0.5, "informative": 0.5}
    for options, message in (
        (["--reward", "concice=1"], "did you mean 'concise'?"),
        (["--reward", "good=1", "--reward-model", "good"], "--reward-model"),
        (["--reward", "good=1", "--reward-model", f"good={files / 'nowhere'}"], "nowhere"),
        (["--reward", "concise=1", "--method", "dpo"], "add --method grpo"),
        ([], "unknown side 'both'"),
    ):
        code, _, err = psoups(*mixed[:-1], files / "new", *options)
        assert (code, message in err) == (2, True), err


def test_an_adapter_is_trained_on_completions_and_an_expert_on_top_of_it(
    psoups: Run, small_base: Path, files: Path
) -> None:
    recipe = REWARD_RECIPE.replace("reward: ", "sft: ")
    (files / "sft.yaml").write_text(recipe)
    (files / "rows.jsonl").write_text('{"prompt": "wash it", "completion": "rub it dry"}\n' * 4)
    arguments = ["train", "polite", "--method", "sft", "--base", small_base, "--device", "cpu", "--json"]
    arguments += ["--recipe", files / "sft.yaml", "--data", files / "rows.jsonl", "--out", files / "polite"]
    code, out, _ = psoups(*arguments)
    assert code == 0
    assert json.loads(out)["method"] == "sft"
    assert psoups(*_pairs(files, small_base, "--on", files / "polite", "--prompts", files / "prompts.txt"))[0] == 0
    code, out, _ = psoups(*_train(files, small_base, "--on", files / "polite", "--json"))
    assert code == 0
    assert json.loads(out)["on"]["name"] == "polite"
