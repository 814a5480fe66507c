from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from personalized_soups.declare.profile import MethodName
from personalized_soups.errors import UsageError
from personalized_soups.methods.table import METHODS, method_named


def test_every_row_names_a_function_with_its_source() -> None:
    for name, row in METHODS.items():
        assert row.name == name
        function = row.load()
        assert function.__name__ == name
        assert row.source
        assert row.formula
        assert function.__doc__


def test_profiles_and_the_table_know_the_same_methods() -> None:
    assert set(get_args(MethodName)) == set(METHODS)


def test_the_table_prints_without_torch() -> None:
    code = "import sys, personalized_soups.methods.table; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]


def test_an_unknown_method_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no merge method 'linaer'") as caught:
        method_named("linaer")
    assert caught.value.mend == "did you mean 'linear'?"
