from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.methods.method import Method
from personalized_soups.methods.plugins import (
    find_method,
    installed_methods,
    is_builtin,
    is_method_name,
    method_names,
)
from personalized_soups.methods.table import METHODS
from tests.packages import install_package

MODULE = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
from personalized_soups.methods.method import Method

def first(deltas, weights):
    '''Return the first delta.

    The others have no effect.
    '''
    return weights[0] * deltas[0]

def kept(deltas, weights, *, density):
    return density * deltas[0]

row = Method("any", kept, "dense", ("folded",), options=("density",))
bad_row = Method("any", kept, "linear", ("gated",))
number = 3
"""
ENTRY_POINTS = """[personalized_soups.methods]
first = clipping:first
kept = clipping:row
ties = clipping:first
gone = clipping:nothing
number = clipping:number
bad = clipping:bad_row
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    install_package(tmp_path / "site", "clipping", MODULE, ENTRY_POINTS)
    install_package(
        tmp_path / "site", "wrecked", "import no_such_module", "[personalized_soups.methods]\nlost = wrecked:f\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for name in ("clipping", "wrecked", "echo"):
        sys.modules.pop(name, None)


def halved(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return half of the first delta."""
    return deltas[0] * (weights[0] / 2)


def test_a_function_is_a_dense_method_named_by_its_place() -> None:
    row = find_method(halved)
    assert (row.name, row.family, row.encodings) == (f"{__name__}:halved", "dense", ("truncated", "folded"))
    assert row.load() is halved
    assert row.about == "Return half of the first delta."
    assert not is_builtin(row)
    assert is_builtin(find_method("ties"))
    assert find_method(METHODS["ties"]) is METHODS["ties"]


def test_names_of_installed_packages_are_known_without_an_import(site: Path) -> None:
    assert list(installed_methods()) == ["bad", "first", "gone", "kept", "lost", "number"]
    assert method_names()[: len(METHODS)] == list(METHODS)
    assert is_method_name("first")
    assert is_method_name("ties")
    assert not is_method_name("frist")
    assert not (site / "imported").exists()


def test_a_name_imports_its_package_when_it_is_used(site: Path) -> None:
    row = find_method("first")
    assert (site / "imported").exists()
    assert (row.name, row.family, row.about) == ("first", "dense", "Return the first delta.")
    row = find_method("kept")
    assert (row.name, row.encodings, row.options) == ("kept", ("folded",), ("density",))


def test_a_package_cannot_replace_a_builtin_method(site: Path) -> None:
    assert find_method("ties") is METHODS["ties"]
    assert not (site / "imported").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gone", "'gone' of the package clipping 1.0 cannot be imported from clipping:nothing: AttributeError"),
        ("lost", "'lost' of the package wrecked 1.0 cannot be imported from wrecked:f: ModuleNotFoundError"),
        ("number", "'number' of the package clipping 1.0 cannot be used: the merge method is 3; expected"),
        ("bad", "'bad' of the package clipping 1.0 cannot be used: the Method 'bad' cannot be used: its family is"),
    ],
)
@pytest.mark.usefixtures("site")
def test_a_broken_entry_point_is_an_error_that_names_the_package(name: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_method(name)
    assert what in caught.value.what
    assert caught.value.what.split("package ")[1].split()[0] in caught.value.mend


def test_one_name_of_two_packages_is_rejected(site: Path) -> None:
    install_package(site, "echo", MODULE, "[personalized_soups.methods]\nfirst = echo:first\n")
    with pytest.raises(UsageError, match=r"several packages provide .* 'first': clipping 1\.0, echo 1\.0"):
        find_method("first")


@pytest.mark.usefixtures("site")
def test_an_unknown_name_is_an_error_with_the_nearest_of_all_names() -> None:
    with pytest.raises(UsageError, match="unknown merge method 'frist'") as caught:
        find_method("frist")
    assert caught.value.mend == "did you mean 'first'?"
    with pytest.raises(UsageError) as caught:
        find_method("linaer")
    assert caught.value.mend == "did you mean 'linear'?"


def test_a_package_installed_later_is_found(site: Path) -> None:
    assert not is_method_name("louder")
    install_package(site, "echo", MODULE, "[personalized_soups.methods]\nlouder = echo:first\n")
    assert is_method_name("louder")
    assert find_method("louder").name == "louder"


@pytest.mark.parametrize("wrong", [functools.partial(halved), 3, dict, None])
def test_what_is_no_function_is_rejected(wrong: object) -> None:
    with pytest.raises(UsageError, match="expected a name, a Method or a function"):
        find_method(wrong)  # type: ignore[arg-type]


SOUND = Method("mine", halved, "dense", ("folded",))


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (replace(SOUND, name="ties"), "its name is 'ties'; expected a name that no built-in method has"),
        (replace(SOUND, family="linear"), "its family is 'linear'; expected 'dense' or 'factor'"),
        (replace(SOUND, encodings=("stacked",)), "its encodings are ('stacked',); expected some of"),
        (replace(SOUND, encodings=()), "its encodings are (); expected some of ('truncated', 'folded')"),
        (replace(SOUND, options=("sharpness",)), "its options include sharpness; expected some of density"),
        (replace(SOUND, options=("epsilon",)), "it has no option 'density'"),
        (replace(SOUND, trims_globally=True), "it has no option 'density'"),
        (replace(SOUND, coefficients="a:b"), "it has coefficients"),
        (replace(SOUND, divides_by_sum=True), "it sets divides_by_sum"),
    ],
)
def test_a_method_that_cannot_work_is_rejected_with_the_reason(method: Method, what: str) -> None:
    assert find_method(SOUND) is SOUND
    with pytest.raises(UsageError) as caught:
        find_method(method)
    assert what in caught.value.what


def test_plugins_are_listed_without_torch() -> None:
    code = (
        "import sys\nfrom personalized_soups.methods.plugins import method_names, is_method_name\n"
        "method_names(), is_method_name('x'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    assert done.stdout.split() == ["False", "False"]
