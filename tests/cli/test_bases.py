"""`--base` of every command when the hub does not answer: at most one request, and an error with both fixes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.experts import write_expert
from tests.hub import Hub, used_hub

COMMANDS = {
    "generate": "generate hello --base NAME",
    "generate an adapter": "generate hello --base NAME --adapter experts/one",
    "generate a soup": "generate hello --base NAME --experts experts --weights one=1",
    "generate many": "generate --base NAME --experts experts --profiles users.jsonl --prompts prompts.txt --out a",
    "pairs": "pairs concise --base NAME --prompts prompts.txt --out new.jsonl",
    "train": "train concise --base NAME --data pairs.jsonl --out expert",
    "sweep": "sweep one two --base NAME --experts experts --prompts prompts.txt --out sweep",
    "serve": "serve --base NAME --experts experts --port 0",
    "doctor": "doctor experts --base NAME",
    "merge --base": "merge --experts experts --weights one=1 --base NAME --out soup",
    "merge --into-base": "merge --experts experts --weights one=1 --into-base NAME --out soup",
    "merge-many --into-base": "merge-many users.jsonl --experts experts --into-base NAME --out soups",
}


@pytest.fixture
def hub(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for index, name in enumerate(("one", "two")):
        write_expert(tmp_path / "experts" / name, seed=index)
    (tmp_path / "prompts.txt").write_text("wash the kettle\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "users.jsonl").write_text('{"user": "u", "weights": {"one": 1}}\n')
    monkeypatch.chdir(tmp_path)
    with used_hub(small_base, tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.mark.parametrize("way", ["closes", "hangs", "refuses"])
@pytest.mark.parametrize("command", COMMANDS)
def test_at_most_one_request_goes_to_the_hub_and_the_error_names_both_fixes(
    psoups: Run, hub: Hub, command: str, way: str
) -> None:
    hub.way = way
    code, _, err = psoups(*COMMANDS[command].replace("NAME", "nofolder").split())
    assert code == 2
    assert "at: nofolder" in err
    assert "folder" in err
    assert "hf download nofolder" in err
    assert hub.asked_for_model in ([], ["HEAD /nofolder/resolve/main/config.json"])
