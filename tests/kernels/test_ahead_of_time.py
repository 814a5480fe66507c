"""Every launch of every kernel compiles for real GPUs, on a machine that has none: see ahead_of_time.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import ahead_of_time
from tests.kernels.interpreter import ROOT, needs_triton

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _compiled(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead_of_time", *arguments],
        cwd=path,  # which is looked through first
        env={**environment, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
@pytest.mark.parametrize("dtype", ahead_of_time.DTYPES)
@pytest.mark.parametrize(
    "capability",
    [
        pytest.param(each, marks=pytest.mark.slow if each == ahead_of_time.FULL else ())
        for each in ahead_of_time.CAPABILITIES
    ],
)
def test_every_launch_compiles(capability: int, dtype: torch.dtype) -> None:
    done = _compiled(str(capability), NAMES[dtype])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = done.stdout.splitlines()
    assert all(line.startswith(f"sm_{capability} {NAMES[dtype]} ") and line.endswith(" bytes") for line in lines)
    kernels = {line.split()[2] for line in lines}
    assert kernels == {"add_gated_kernel", "weighted_sums_kernel", "scale_columns_kernel"}
    # the launches of models in this dtype, or one for each kernel and each of its flags
    every = ahead_of_time.launches(dtype)
    flags = {
        (launch.kernel, tuple(value for _, value in launch.constants if isinstance(value, bool))) for launch in every
    }
    assert len(lines) == (len(every) if capability == ahead_of_time.FULL else len(flags))
    assert {"HAS_COLUMNS=True", "HAS_COLUMNS=False", "IS_ALIGNED=True", "IS_ALIGNED=False"} <= {
        word.rstrip(",") for line in lines for word in line.split()
    }


@needs_triton
def test_an_annotation_that_only_the_interpreter_passes_over_is_seen(tmp_path: Path) -> None:
    """The kernel of 1e97c6a had `y: Any`: 24 tests in the interpreter passed, and it never compiled."""
    copied = tmp_path / "personalized_soups"
    copied.mkdir()
    for entry in (ROOT / "personalized_soups").iterdir():
        if entry.name != "kernels":
            (copied / entry.name).symlink_to(entry)
    (copied / "kernels").mkdir()
    for entry in (ROOT / "personalized_soups" / "kernels").glob("*.py"):
        text = entry.read_text(encoding="utf-8")
        if entry.name == "source.py":
            text = text.replace("    out, pristine, scales,\n", "    out: Any, pristine, scales,\n")
            text = text.replace("import triton\n", "from typing import Any\n\nimport triton\n", 1)
            assert "out: Any" in text
        (copied / "kernels" / entry.name).write_text(text, encoding="utf-8")
    done = _compiled("80", "fp32", path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert failed
    assert all("scale_columns_kernel" in line and "CompilationError" in line for line in failed)
