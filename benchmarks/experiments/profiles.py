"""Everybody's profiles in a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.experiments.experiment import Context, Experiment, Figures, filled
from benchmarks.measure import Run, Way, script
from benchmarks.rows import Bar, Row
from benchmarks.shapes import Scale

# The lines, the store and its log, and the same rows once more, a profile.
_BYTES_OF_A_PROFILE = 800


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiment at this scale."""
    rows = (
        Row(
            "profiles-import",
            f"psoups profile import, {scale.profiles:,} profiles, SQLite, whole process",
            "sqlite3 alone, unchecked",
            part="serving",
            bar=Bar("below", 60, unit="s"),
        ),
        Row(
            "profiles-lookup",
            "ProfileStore.get among them, 99th percentile",
            "sqlite3 alone and JSON",
            part="serving",
            unit="ms",
            bar=Bar("below", 1, unit="ms"),
        ),
    )
    return [Experiment(rows, _run, (), scale.profiles * _BYTES_OF_A_PROFILE)]


def _run(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    count = context.scale.profiles
    runs = context.measure(Way("ours", lambda out: script("ours_profiles", count=count, out=out), most=3))["ours"]
    yield filled(rows["profiles-import"], _of("import_seconds")(runs), _of("plain_import_seconds")(runs))
    yield filled(rows["profiles-lookup"], _of("lookup_seconds", 1e3)(runs), _of("plain_lookup_seconds", 1e3)(runs))


def _of(name: str, factor: float = 1.0) -> Callable[[list[Run] | Exception], Figures]:
    return lambda runs: runs if isinstance(runs, Exception) else [float(run.report[name]) * factor for run in runs]
