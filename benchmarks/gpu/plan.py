"""The stages of a GPU run, and what share of six minutes each gets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.experiments.every import experiments
from benchmarks.experiments.experiment import Experiment
from benchmarks.gpu.stages import Stage
from benchmarks.measure import ROOT
from benchmarks.shapes import Scale

TESTS = ROOT / "tests"

# Kernels are compiled ahead of time, so tests of this folder that are not marked `gpu` run too. Left out are the slow
# ones (GPU tests launch what those compile) and Triton's interpreter, which Triton 3.6 breaks off under NumPy 2.4.
KERNELS = "tests/kernels"
_KERNEL_TESTS = ("-m", "gpu or not slow", "-k", "gpu or not interpreter")

# The mark in a test's source.
MARK = re.compile(r"\bmark\.gpu\b")

# Seconds. The rest of the six minutes is for this process: imports, and the page.
TOTAL_SECONDS = 350
_CARD_SECONDS = 15
_INPUT_SECONDS = 25
_KERNEL_SECONDS = 50
_TEST_SECONDS = 50  # of all folders together


@dataclass(frozen=True, slots=True)
class Share:
    """What one experiment gets: seconds, and how many fresh processes of each way fit into them."""

    seconds: float
    repeats: int


_SHARES = {
    "base-gpu": Share(25, 1),  # reads and writes 2 GB in each run
    "many-gpu-arithmetic": Share(20, 2),
    "live-free-gpu": Share(25, 2),
    "live-shared-gpu": Share(25, 2),
    "mixing-gpu-linear": Share(30, 1),
    "mixing-gpu": Share(85, 1),  # compiles a model of 32 layers into CUDA graphs, ours and the bare one
}
_DEFAULT_SHARE = Share(20, 1)

# Other versions of the libraries warn of other things, so warnings are not errors here.
PYTEST = ("-m", "pytest", "-q", "-rs", "-W", "default", "-p", "no:cacheprovider")


def stages(scale: Scale, shape: str) -> list[Stage]:
    """Return all stages in order; the one that needs most time is last and gets what the others left over."""
    folders = [folder for folder in gpu_tests() if folder != KERNELS]
    found = [
        Stage("card", ("-m", "benchmarks.machine"), _CARD_SECONDS),
        Stage("inputs", ("-m", "benchmarks.run", "--shape", shape, "--only", "gpu", "--prepare"), _INPUT_SECONDS),
    ]
    if any((ROOT / KERNELS).rglob("test_*.py")):
        found.append(Stage(KERNELS, (*PYTEST, *_KERNEL_TESTS, KERNELS), _KERNEL_SECONDS))
    found += [Stage(folder, (*PYTEST, "-m", "gpu", folder), _TEST_SECONDS / len(folders)) for folder in folders]
    for experiment in sorted(gpu_experiments(scale), key=lambda each: share_of(each).seconds):
        names = tuple(row.name for row in experiment.rows)
        share = share_of(experiment)
        options = ("--shape", shape, "--only", names[0], "--repeats", str(share.repeats), "--no-copies", "--json")
        found.append(Stage(names[0], ("-m", "benchmarks.run", *options), share.seconds, names))
    return found


def gpu_experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments that need a GPU."""
    return [each for each in experiments(scale) if each.needs_gpu]


def gpu_tests(tests: Path = TESTS) -> list[str]:
    """Return the folders directly below `tests` that mark a test as one for a GPU, and the files next to them.

    Whole folders, not files: a conftest or a helper module may mark the tests of others.
    """
    marked = {
        file.relative_to(tests).parts[0]
        for file in tests.rglob("*.py")
        if MARK.search(file.read_text(encoding="utf-8"))
    }
    return [f"{tests.name}/{name}" for name in sorted(marked)]


def share_of(experiment: Experiment) -> Share:
    """Return what an experiment gets."""
    return _SHARES.get(experiment.rows[0].name, _DEFAULT_SHARE)
