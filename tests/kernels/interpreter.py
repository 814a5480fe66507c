"""Running test files in Triton's interpreter: TRITON_INTERPRET must be set before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform"
)


def num_passed(file: str) -> int:
    """Run a file of this folder, in a process of its own, and return how many of its tests passed; all have to."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            # Triton converts arrays of one element, of which NumPy before 2.4 warns
            *("-W", "ignore:Conversion of an array:DeprecationWarning"),
            str(Path(__file__).parent / file),
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted is not None
    return int(counted[1])
