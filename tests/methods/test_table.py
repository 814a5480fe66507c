from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from personalized_soups.errors import UsageError
from personalized_soups.methods.method import Method
from personalized_soups.methods.options import OPTIONS
from personalized_soups.methods.table import METHODS, method_named

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "methods.md"


def promised(row: Method) -> set[str]:
    """The keywords that a row's fields say its function takes."""
    flags = {
        "basis": row.family == "linear",
        "total": row.divides_by_sum,
        "streams": row.is_random,
        "thresholds": row.trims_globally,
    }
    options = {OPTIONS[name].keyword for name in row.options if name != "seed"}
    return options | {keyword for keyword, is_taken in flags.items() if is_taken}


@pytest.mark.parametrize("name", METHODS)
def test_every_row_names_a_function_with_its_source(name: str) -> None:
    row = METHODS[name]
    assert row.name == name
    function = row.load()
    assert function.__name__ == name.replace("@", "_")
    assert row.source
    assert row.formula
    assert row.about.endswith(".")
    assert function.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_a_function_takes_what_its_row_promises(name: str) -> None:
    row = METHODS[name]
    first, weights, *others = inspect.signature(row.load()).parameters.values()
    assert first.name == ("deltas" if row.family == "dense" else "factors")
    assert weights.name == "weights"
    assert {parameter.name for parameter in others} == promised(row)
    if row.options:
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in others)
    # the options have one default, the table's
    assert all(
        parameter.default is parameter.empty
        for parameter in others
        if parameter.name in {"density", "lambda_", "epsilon"}
    )


@pytest.mark.parametrize("name", METHODS)
def test_families_have_their_encodings(name: str) -> None:
    row = METHODS[name]
    assert ("gated" in row.encodings) is (row.family == "linear")
    assert ("stacked" in row.encodings) is (row.family != "dense")
    assert {"truncated", "folded"} <= set(row.encodings)
    assert list(row.options) == [option for option in OPTIONS if option in row.options]


def test_docs_have_a_section_for_every_method_and_no_other() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert re.findall(r"^### `(.+)`$", text, re.MULTILINE) == list(METHODS)
    for name, row in METHODS.items():
        section = text.split(f"### `{name}`\n")[1].split("\n#")[0]
        match = re.search(r"^Options: (.*)\.$", section, re.MULTILINE)
        assert re.findall(r"`(\w+)`", match[1]) == list(row.options) if match else not row.options
        for paper in re.findall(r"arXiv:([\d.]+\d)", row.source):
            assert paper in section


def test_docs_tell_the_defaults_and_bounds() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for option in OPTIONS.values():
        assert f"| `{option.name}` | {option.default:g} | {option.bounds} |" in text


def test_the_table_prints_without_torch() -> None:
    code = "import sys, personalized_soups.methods.table; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    assert done.stdout.split() == ["False", "False"]


def test_an_unknown_method_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown merge method 'linaer'") as caught:
        method_named("linaer")
    assert caught.value.mend == "did you mean 'linear'?"


def test_options_are_filled_in_the_rows_order() -> None:
    row = METHODS["della"]
    assert row.is_random
    assert list(row.resolved({}).items()) == [("density", 0.5), ("epsilon", 0.1), ("lambda", 1.0), ("seed", 0)]
    resolved = row.resolved({"seed": 5.0, "density": 0.25})
    assert list(resolved.items()) == [("density", 0.25), ("epsilon", 0.1), ("lambda", 1.0), ("seed", 5)]
    assert isinstance(resolved["seed"], int)
    assert METHODS["linear"].resolved({}) == {}
    assert METHODS["ties"].resolved({"density": 1, "lambda": 1e-9}) == {"density": 1.0, "lambda": 1e-9}


@pytest.mark.parametrize(
    ("name", "given", "what", "where", "mend"),
    [
        ("ties", {"densty": 0.5}, "ties takes no option 'densty'", "densty", "did you mean 'density'?"),
        ("ties", {"seed": 1}, "ties takes no option 'seed'", "seed", "choose from: density, lambda"),
        ("linear", {"density": 0.5}, "linear takes no option 'density'", "density", "linear takes no options"),
        ("ties", {"density": 0.0}, "density is 0; it must be above 0 and at most 1", "density", "use 0.5, the default"),
        ("ties", {"density": 1.01}, "density is 1.01; it must", "density", "use 0.5, the default"),
        ("ties", {"density": float("nan")}, "density is nan; it must", "density", "use 0.5, the default"),
        ("ties", {"lambda": float("inf")}, "lambda is inf; it must be above 0", "lambda", "use 1, the default"),
        ("ties", {"lambda": -1.0}, "lambda is -1; it must be above 0", "lambda", "use 1, the default"),
        ("dare_linear", {"seed": -1}, "seed is -1; it must be a whole number at least 0", "seed", "use 0, the default"),
        ("dare_linear", {"seed": 0.5}, "seed is 0.5; it must be a whole number", "seed", "use 0, the default"),
        ("dare_linear", {"seed": 2.0**54}, "at most 9007199254740992", "seed", "use 0, the default"),
        ("dare_linear", {"seed": float("inf")}, "seed is inf", "seed", "use 0, the default"),
        (
            "della",
            {"epsilon": 0.5},
            "gives keep-probabilities from 0 to 1; they must",
            "epsilon",
            "below 0.5 and at most 0.5",
        ),
        (
            "della",
            {"density": 0.95},
            "gives keep-probabilities from 0.85 to 1.05; they must",
            "density",
            "at most 0.05",
        ),
        (
            "della",
            {"epsilon": -0.1},
            "epsilon is -0.1; it must be at least 0 and at most 1",
            "epsilon",
            "use 0.1, the default",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(
    name: str, given: dict[str, float], what: str, where: str, mend: str
) -> None:
    with pytest.raises(UsageError) as caught:
        METHODS[name].resolved(given)
    assert what in caught.value.what
    assert caught.value.where == where
    assert mend in caught.value.mend
