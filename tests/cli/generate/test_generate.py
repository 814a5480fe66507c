from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.training.expert import train_expert

Run = Callable[..., tuple[int, str, str]]
PROMPT = "how to wash the kettle?"
RECIPE = """{"lora": {"rank": 4, "alpha": 8}, "dpo": {"beta": 0.3, "max_length": 64},
    "optimizer": {"learning_rate": 0.05, "max_steps": 3, "batch_size": 2}}"""


@pytest.fixture(scope="module")
def experts(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    data = folder / "pairs.jsonl"
    lines = [
        {"prompt": [{"role": "user", "content": f"wash {thing}?"}]}
        | {"chosen": [{"role": "assistant", "content": "rub it"}]}
        | {"rejected": [{"role": "assistant", "content": "then dry the towel"}]}
        for thing in ("kettle", "soap")
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    recipe = TrainingRecipe.model_validate_json(RECIPE)
    for seed, side in enumerate(("concise", "friendly")):
        train_expert(side, base=small_base, data=data, out=folder / side, recipe=recipe, device="cpu", seed=seed)
    return folder


def _ask(*more: object, base: Path) -> list[object]:
    return ["generate", "--base", base, "--device", "cpu", "--max-new-tokens", 12, *more]


def test_the_answer_streams_to_stdout(psoups: Run, small_base: Path) -> None:
    code, out, err = psoups(*_ask("--seed", 3, PROMPT, base=small_base))
    want = Generator.open(small_base, device="cpu").answers([PROMPT], max_new_tokens=12, temperature=0.7, seed=3)[0][0]
    assert (code, out, err) == (0, want + "\n", "")


def test_the_prompt_comes_from_standard_input_too(
    psoups: Run, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, asked, _ = psoups(*_ask("--greedy", PROMPT, base=small_base))
    for argument in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
        assert psoups(*_ask("--greedy", *argument, base=small_base)) == (0, asked, "")


def test_an_adapter_and_a_soup_of_it_alone_answer_alike(psoups: Run, small_base: Path, experts: Path) -> None:
    _, base, _ = psoups(*_ask("--greedy", PROMPT, base=small_base))
    _, adapter, _ = psoups(*_ask("--greedy", "--adapter", experts / "concise", PROMPT, base=small_base))
    code, soup, err = psoups(*_ask("--greedy", "--experts", experts, "--weights", "concise=1", PROMPT, base=small_base))
    assert (code, err) == (0, "")
    assert soup == adapter
    assert adapter != base


def test_a_profile_is_merged_for_the_answer(psoups: Run, small_base: Path, experts: Path, tmp_path: Path) -> None:
    profile = tmp_path / "me.yaml"
    profile.write_text("weights: {concise: 0.6, friendly: 0.6}\n")
    code, out, _ = psoups(
        *_ask("--json", "--greedy", "--experts", experts, "--profile", profile, PROMPT, base=small_base)
    )
    assert code == 0
    printed = json.loads(out)
    assert printed["prompt"] == PROMPT
    weights = ("--weights", "concise=0.6,friendly=0.6")
    _, streamed, _ = psoups(*_ask("--greedy", "--experts", experts, *weights, PROMPT, base=small_base))
    assert streamed == printed["answer"] + "\n"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--adapter", "a", "--experts", "e", "--weights", "x=1"], "--adapter, --experts"),
        (["--experts", "e"], "--profile, --weights"),
        (["--experts", "e", "--profile", "p", "--weights", "x=1"], "--profile, --weights"),
        (["--weights", "x=1"], "--experts"),
        (["--dtype", "float64"], "--dtype"),
        (["--device", "toaster"], "--device"),
        (["--adapter", "no_such_folder"], "no_such_folder"),
    ],
)
def test_options_that_contradict_are_usage_errors(
    psoups: Run, small_base: Path, options: list[str], where: str
) -> None:
    code, out, err = psoups("generate", "--base", small_base, *options, PROMPT)
    assert (code, out) == (2, "")
    assert f"at: {where}" in err
    assert "mend: " in err
    assert "Traceback" not in err


def test_a_prompt_in_a_wrong_encoding_is_rejected(
    psoups: Run, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    code, out, err = psoups("generate", "--base", small_base)
    assert (code, out) == (2, "")
    assert "0xe9" in err
    assert "at: standard input" in err
    code, out, err = psoups("generate", "--base", small_base, "caf\udce9")  # as Python hands on such an argument
    assert (code, out) == (2, "")
    assert "at: PROMPT" in err


def test_numbers_out_of_range_are_usage_errors(psoups: Run, small_base: Path) -> None:
    for option in (["--temperature", "inf"], ["--temperature", "nan"], ["--seed", str(2**32)]):
        code, out, err = psoups("generate", "--base", small_base, *option, PROMPT)
        assert (code, out) == (2, "")
        assert option[0] in err


def test_an_adapter_of_another_base_needs_same_base(
    psoups: Run, small_base: Path, experts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_base, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    for source in (["--adapter", experts / "concise"], ["--experts", experts, "--weights", "concise=1"]):
        code, _, err = psoups(*_ask(*source, PROMPT, base=other))
        assert code == 2
        assert "--same-base" in err
        assert psoups(*_ask(*source, "--same-base", PROMPT, base=other))[0] == 0


def test_an_empty_prompt_and_a_missing_base(psoups: Run, small_base: Path, tmp_path: Path) -> None:
    code, _, err = psoups("generate", "--base", small_base, "  ")
    assert code == 2
    assert "the prompt is empty" in err
    code, _, err = psoups("generate", "--base", tmp_path / "none", PROMPT)
    assert code == 2
    assert f"at: {tmp_path / 'none'}" in err


def test_a_template_that_rejects_and_a_token_outside_the_embedding(
    psoups: Run, small_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<kettle>"])
    tokenizer.save_pretrained(base)
    code, out, err = psoups(*_ask("wash the <kettle>", base=base))
    assert (code, out) == (2, "")
    assert "the base has no token" in err
    assert "'<kettle>'" in err
    (base / "chat_template.jinja").write_text("{{ raise_exception('No!') }}")
    code, out, err = psoups(*_ask("wash", base=base))
    assert (code, out) == (2, "")
    assert "rejects the messages: No!" in err
    assert "at: the prompt that begins 'wash'" in err
