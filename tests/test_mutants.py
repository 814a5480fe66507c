"""That the table of deliberate faults still fits the code; `make mutants` applies them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants import ROOT, Mutant, mutants, outcome_of, tried

MUTANTS = mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_applies_and_names_tests_that_are_there(mutant: Mutant) -> None:
    changed = mutant.applied(ROOT)
    assert changed != (ROOT / mutant.file).read_text(encoding="utf-8")
    ast.parse(changed)
    assert mutant.tests
    assert all((ROOT / test).exists() for test in mutant.tests)
    assert mutant.breaks


def test_there_are_enough_of_them_all_over_the_engine() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 24
    folders = {part for mutant in MUTANTS for part in Path(mutant.file).parts}
    assert {"methods", "merging", "bank"} <= folders


def test_a_text_that_is_not_there_or_there_twice_does_not_apply(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x = 1\ny = 1\n")
    for old in ("z = 1", " = 1"):
        with pytest.raises(ValueError, match=r"occurs [02] times"):
            Mutant("name", "code.py", old, "", (), "").applied(tmp_path)


def test_what_kills_and_what_does_not(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def double(x):\n    return x + x\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    test = (
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('code_of_it', 'code.py')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "def test_it():\n    assert module.double(3) == 6\n"
    )
    (tmp_path / "test_it.py").write_text(test)

    def outcome(old: str, new: str) -> str:
        return tried(Mutant("name", "code.py", old, new, ("test_it.py",), ""), tmp_path)[0]

    assert outcome_of(tmp_path, ["test_it.py"]) == ("green", "")
    assert outcome("x + x", "x - x") == "red"
    assert outcome("x + x", "2 * x") == "green"  # survives
    assert outcome("def", "raise ValueError\ndef") == "invalid"  # no test could be collected
    assert outcome("nowhere", "") == "invalid"
    assert (tmp_path / "code.py").read_text() == "def double(x):\n    return x + x\n"
