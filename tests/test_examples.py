"""Every example runs; a new one must be named here. The README's commands are those that exist."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.scoring.scorers import scorer_of
from tests.experts import write_expert

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def test_no_example_is_forgotten() -> None:
    assert sorted(path.name for path in EXAMPLES.rglob("*") if path.is_file() and path.suffix != ".pyc") == [
        "formality.yaml",
        "live.py",
        "one_batch.py",
        "openai_client.py",
        "three_users.py",
    ]


def test_a_dimension_of_ones_own_needs_no_code() -> None:
    catalogue = load(EXAMPLES / "formality.yaml", Catalogue)
    score = scorer_of(catalogue, "formal")
    assert score("", "It is advisable to rinse it. Furthermore, kindly dry it.").toward("high") == 1.0
    assert score("", "Hey, just rinse it, yeah?").toward("high") == 0.0


def test_three_users_get_three_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {f"model.layers.{layer}.mlp.up_proj": (384, 128) for layer in range(4)}
    for seed, side in enumerate(("elementary", "expert", "concise", "informative", "friendly", "unfriendly")):
        write_expert(tmp_path / side, seed=seed, rank=2, alpha=4, shapes=shapes)
    monkeypatch.setattr(sys, "argv", ["three_users.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "three_users.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "How do I clean an old kettle?" in output
    answers = [line.partition(": ")[2] for line in output.splitlines() if ": " in line]
    assert len(answers) == 4
    assert all(answers)


def test_three_users_in_one_batch_get_what_their_merged_models_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {f"model.layers.{layer}.mlp.up_proj": (384, 128) for layer in range(4)}
    for seed, side in enumerate(("elementary", "expert", "concise", "informative", "friendly", "unfriendly")):
        write_expert(tmp_path / side, seed=seed, rank=2, alpha=4, shapes=shapes)
    output = {}
    for example in ("three_users.py", "one_batch.py"):
        monkeypatch.setattr(sys, "argv", [example, str(tmp_path)])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        output[example] = dict(line.split(": ", 1) for line in lines if ": " in line)
    cooling = output["one_batch.py"].pop("cooling down")
    assert output["one_batch.py"] == output["three_users.py"]
    assert len(output["one_batch.py"]) == 4
    assert cooling


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
def test_one_live_model_gives_every_user_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "live.py"), run_name="__main__")
    answers = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if line)
    assert list(answers) == ["the base", "Ada", "Ben"]
    assert len(set(answers.values())) == 3


def test_the_openai_client_gets_a_stored_profiles_answer_and_one_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from personalized_soups.serving.engine.limits import Limits
    from personalized_soups.serving.web.settings import Settings
    from personalized_soups.tiny import BASE_FOLDER
    from tests.serving.servers import running

    shapes = {f"model.layers.{layer}.mlp.up_proj": (384, 128) for layer in range(4)}
    for seed, side in enumerate(("elementary", "expert", "concise", "informative", "friendly", "unfriendly")):
        write_expert(tmp_path / "experts" / side, seed=seed, rank=2, alpha=4, shapes=shapes)
    settings = Settings("tiny", limits=Limits(max_context=512))
    with running(BASE_FOLDER, tmp_path / "experts", settings, profiles=tmp_path / "p.db") as served:
        monkeypatch.setattr(sys, "argv", ["openai_client.py", f"{served.url}/v1"])
        found = runpy.run_path(str(EXAMPLES / "openai_client.py"), run_name="__main__")
        found["client"].close()
        own = served.model.generate(
            ["How do I clean an old kettle?"] * 2,
            [
                {"expert": 0.6, "concise": 0.6, "unfriendly": 0.6},
                {"elementary": 0.6, "informative": 0.6, "friendly": 0.6},
            ],
            temperature=1.0,
            seed=1,
            places=[0, 0],
        )
    output = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert [output["soup:ada@1"].strip(), output["of the moment"].strip()] == own


def test_every_command_and_file_that_the_readme_names_is_there() -> None:
    from personalized_soups.cli.app import COMMAND_GROUPS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"psoups ([a-z]+)", readme))
    assert (
        {"pairs", "train", "merge", "generate", "inspect"}
        <= commands
        <= {name for names in COMMAND_GROUPS.values() for name in names}
    )
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in target]
    assert [target for target in linked if not (ROOT / target).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [name for name in re.findall(r"`make ([a-z]+)`", readme) if f"\n{name}:" not in makefile] == []
