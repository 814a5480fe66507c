"""All experiments, in the order of the table."""

from __future__ import annotations

from benchmarks.experiments import adapter, into_base, live, many, mixing, profiles, serving, tuning
from benchmarks.experiments.experiment import Experiment
from benchmarks.shapes import Scale


def experiments(scale: Scale) -> list[Experiment]:
    """Return every experiment at a scale."""
    modules = (adapter, into_base, many, live, mixing, tuning, profiles, serving)
    return [each for module in modules for each in module.experiments(scale)]
