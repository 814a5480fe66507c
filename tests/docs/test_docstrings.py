"""Every function and class of the public API has an example in its docstring, and the examples run.

An example finds `experts` (six experts of the embedded base) in the current folder, and the public names without an
import. A library, a profile and a small model are made once for all of them.
"""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import personalized_soups

# TINY_BASE and __version__ are values.
NAMES = [name for name in personalized_soups.__all__ if name not in {"TINY_BASE", "__version__"}]
# Their examples would take minutes, or need a network; the tutorial runs them as commands.
SHOWN_ONLY = {"train_expert"}


def _examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(getattr(personalized_soups, name)) or "")


@pytest.fixture
def names() -> dict[str, Any]:
    return {name: getattr(personalized_soups, name) for name in personalized_soups.__all__}


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name: str) -> None:
    assert _examples(name)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
@pytest.mark.parametrize("name", sorted(set(NAMES) - SHOWN_ONLY))
def test_the_example_runs(name: str, names: dict[str, Any], workplace: Path) -> None:
    examples = _examples(name)
    test = doctest.DocTest(examples, names, name, None, 0, None)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=output.append, clear_globs=False)
    assert runner.failures == 0, "".join(output)
    assert (workplace / "experts").is_dir()
