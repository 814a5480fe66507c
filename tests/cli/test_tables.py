"""Every table that a command prints, on terminals of 80 and of 120 columns: no heading and no name is cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.cli import render
from personalized_soups.cli.generate import sweep
from personalized_soups.cli.study import quickstart_tables
from tests.cli.conftest import Run
from tests.evaluation.conftest import results as quickstart_results  # noqa: F401 # a fixture
from tests.experts import write_expert
from tests.merging.writing.test_into_base import write_base

SIDES = ("elementary", "expert", "concise", "informative", "friendly", "unfriendly")
LONG = (
    "llama-3.1-8b-dpo-elementary-v2",
    "llama-3.1-8b-dpo-informative-v2",
    "an-expert-whose-name_has.forty-two-letters",
)


class Shown:
    """The texts that tables and records were asked to show, and what a terminal of `width` columns then held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int) -> None:
        self.texts: list[str] = []
        self.width = width
        self._capsys = capsys
        table, record = render.show_table, render.show_record

        def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], **options: Any) -> None:
            self.texts += [*columns, options.get("title") or ""]
            self.texts += [str(cell) for row in rows for cell in row if isinstance(cell, str | int)]
            table(columns, rows, **options)

        def show_record(shown: Mapping[str, Any], **options: Any) -> None:
            self.texts += [*shown, *(str(value) for value in shown.values() if isinstance(value, str | int))]
            record(shown, **options)

        monkeypatch.setattr(render, "show_table", show_table)
        monkeypatch.setattr(render, "show_record", show_record)
        monkeypatch.setenv("COLUMNS", str(width))

    def check(self, out: str | None = None) -> None:
        """Assert that no word of any text is broken, and that no line is longer than needed."""
        out = self._capsys.readouterr().out if out is None else out
        assert self.texts
        words = [word for text in self.texts for word in text.split() if word not in {"True", "False"}]
        assert [word for word in words if word not in out] == []
        for line in out.splitlines():
            assert len(line.rstrip()) <= self.width or max(map(len, line.split())) > self.width // 2, line


@pytest.fixture(params=[80, 120])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    return Shown(monkeypatch, capsys, request.param)


@pytest.fixture(params=["the paper's names", "long names"])
def experts(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names = list(SIDES if request.param == "the paper's names" else (*LONG, *SIDES[:2]))
    for seed, name in enumerate(names):
        write_expert(tmp_path / "experts" / name, seed=seed, rank=2 + seed)
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return names


def test_doctor(psoups: Run, shown: Shown, experts: list[str]) -> None:
    weights = f"{experts[0]}=0.5,{experts[2]}=0.5"
    code, out, _ = psoups("doctor", "experts", "--base", "base", "--weights", weights)
    assert code == 0
    shown.check(out)


def test_doctors_findings_on_a_long_path(psoups: Run, shown: Shown, experts: list[str]) -> None:
    folder = Path("a-folder-with-quite-a-long-name", "and-another-one-below-it", "experts-of-the-first-of-november")
    folder.parent.mkdir(parents=True)
    Path("experts").rename(folder)
    (folder / experts[0] / "adapter_model.safetensors").write_bytes(b"cut")
    code, out, _ = psoups("doctor", folder.absolute())
    assert code == 1
    shown.check(out)


def test_inspect(psoups: Run, shown: Shown, experts: list[str]) -> None:
    for what in (["experts"], [f"experts/{experts[0]}"], ["--methods"]):
        shown.texts.clear()
        code, out, _ = psoups("inspect", *what)
        assert code == 0
        shown.check(out)


def test_merge_and_verify(psoups: Run, shown: Shown, experts: list[str]) -> None:
    code, out, _ = psoups("merge", "--experts", "experts", "--weights", f"{experts[0]}=0.5", "--out", "soup")
    assert code == 0
    shown.check(out)
    write_expert(Path("experts", experts[0]), seed=99, rank=2)
    shown.texts.clear()
    code, out, _ = psoups("verify", "soup")
    assert code == 1
    shown.check(out)


def test_profile(psoups: Run, shown: Shown, experts: list[str]) -> None:
    weights = ",".join(f"{name}=0.125" for name in experts)
    user = "somebody.with.a.long.address@mail.example.com"
    assert psoups("profile", "set", user, "--weights", weights, "--method", "ties")[0] == 0
    for command in (["list"], ["history", user]):
        shown.texts.clear()
        code, out, _ = psoups("profile", *command)
        assert code == 0
        shown.check(out)


def test_quickstart(shown: Shown, request: pytest.FixtureRequest) -> None:
    names = ["base", *(f"{first} + {second} + friendly" for first, second in zip(SIDES[:2], SIDES[2:4], strict=True))]
    answers = [{"name": name, "answer": f"Wash it, {name}, with warm water and rub it dry."} for name in names]
    examples: Any = {"prompt": "How do I clean an old kettle?", "answers": answers}
    quickstart_tables.show_results(request.getfixturevalue("quickstart_results"), examples)
    shown.check()


def test_sweep(shown: Shown) -> None:
    results = {
        "points": [[0.0, 0.25], [1.0, 0.75]],
        "intervals": [[0.2, 0.3], [0.7, 0.8]],
        "valid": [1.0, 0.9],
        "score": "informativeness",
        "low": LONG[0],
        "high": LONG[1],
        "base": 0.5,
        "num_prompts": 3,
        "verdict": "it rises",
    }
    sweep._show(results, Path("sweep"))
    shown.check()


Sized = Callable[[int], None]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Sized:
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


def test_headings_are_broken_before_cells(terminal: Sized, capsys: pytest.CaptureFixture[str]) -> None:
    terminal(40)
    render.show_table(["expert", "the largest difference", "what"], [["informative", 0.5, "a b c d e f g"]])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.split() for line in lines if "─" not in line] == [
        ["the"],
        ["largest"],
        ["expert", "difference", "what"],
        ["informative", "0.5", "a", "b", "c", "d", "e", "f", "g"],
    ]


def test_a_table_that_fits_is_one_line_a_row(terminal: Sized, capsys: pytest.CaptureFixture[str]) -> None:
    terminal(26)
    render.show_table(["expert", "outputs overlap"], [["a", 0.5]])
    assert capsys.readouterr().out.splitlines()[1].split() == ["expert", "outputs", "overlap"]


def test_a_table_too_wide_for_the_terminal_is_shown_row_by_row(
    terminal: Sized, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(20)
    render.show_table(["expert", "inputs overlap"], [["informative", 0.5], ["unfriendly", None]], title="Pairs")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split() for line in lines if line.strip()] == [
        ["Pairs"],
        ["expert", "informative"],
        ["inputs", "overlap", "0.5"],
        ["expert", "unfriendly"],
        ["inputs", "overlap", "-"],
    ]


def test_a_path_longer_than_the_terminal_stays_in_one_piece(
    terminal: Sized, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(40)
    path = "/a/folder/" + "x" * 60 + "/soup"
    render.show_record({"folder": path, "about": "some words that are broken into lines where the terminal ends"})
    out = capsys.readouterr().out
    assert path in out
    assert max(len(line.rstrip()) for line in out.splitlines() if path not in line) <= 40
    render.show_table(["fault", "where"], [["it is not there", path]])
    assert path in capsys.readouterr().out


def test_wide_letters_take_two_columns(terminal: Sized, capsys: pytest.CaptureFixture[str]) -> None:
    terminal(30)
    name = "丁寧な答え" * 2
    render.show_table(["expert", "about"], [[name, "one two three"]])
    assert name in capsys.readouterr().out


def test_json_does_not_depend_on_the_terminal(terminal: Sized, capsys: pytest.CaptureFixture[str]) -> None:
    terminal(10)
    render.show_table(["expert", "inputs overlap"], [["informative", 0.5]], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"expert": "informative", "inputs overlap": 0.5}]
