from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups.cli.app import build_app
from personalized_soups.methods.table import METHODS
from tests.experts import write_expert, write_record


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    for index, name in enumerate(("elementary", "concise", "friendly", "unfriendly")):
        write_expert(tmp_path / "experts" / name, seed=index)
        write_record(tmp_path / "experts" / name, dimension="style" if "friendly" in name else name)
    return tmp_path / "experts"


def psoups(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run one command in this process and return its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        build_app()([str(arg) for arg in args], prog_name="psoups")
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def test_inspect_prints_a_table_or_json(experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = psoups(capsys, "inspect", experts / "concise", "--json")
    assert code == 0
    printed = json.loads(out)
    assert (printed["kind"], printed["side"], printed["rank"], printed["num_modules"]) == ("expert", "concise", 4, 8)
    printed = json.loads(psoups(capsys, "inspect", experts, "--json")[1])
    assert [expert["name"] for expert in printed["experts"]] == ["concise", "elementary", "friendly", "unfriendly"]
    code, out, _ = psoups(capsys, "inspect", experts)
    assert code == 0
    assert "unfriendly" in out


def test_inspect_prints_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(psoups(capsys, "inspect", "--methods", "--json")[1])
    assert [row["method"] for row in printed] == list(METHODS)
    assert {row["method"]: row["options"] for row in printed}["ties"] == "density, lambda"
    assert "--density" in psoups(capsys, "inspect", "--methods")[1]
    assert psoups(capsys, "inspect")[0] == 2
    assert psoups(capsys, "inspect", "x", "--methods")[0] == 2
