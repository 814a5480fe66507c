"""Another soup in a live model, against the bytes that must move for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from benchmarks.experiments.experiment import Context, Experiment, Figures, best, filled, rates
from benchmarks.measure import Run, Way, script
from benchmarks.rows import Bar, Part, Row
from benchmarks.shapes import NUM_EXPERTS, Scale, Shape
from benchmarks.world import Part as WorldPart

Basis = Literal["free", "shared"]

_BAR = Bar("at least", 0.9)

# Large against every cache, and about what one `set` moves.
_COPIED_BYTES = 512 << 20


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments at this scale: one's own device decides the shape, a GPU takes the largest experts."""
    found = []
    for basis in ("free", "shared"):
        found += [
            _experiment(scale.main, basis, "cpu", None),
            _experiment(scale.large, basis, "gpu", _BAR),
        ]
    return found


def moved_bytes(shape: Shape, basis: Basis) -> int:
    """Return the bytes that one `set` must read and write at least.

    Free experts: every expert's B is read and written, scaled; A stays. A shared basis: every B is read, one written.
    """
    return shape.b_bytes * (2 * NUM_EXPERTS if basis == "free" else NUM_EXPERTS + 1)


def _experiment(shape: Shape, basis: Basis, part: Part, bar: Bar | None) -> Experiment:
    name = f"live-{basis}-{part}"
    work = f"LiveAdapter.set, {shape.name}, six experts, {basis} basis"
    row = Row(name, work, "measured bandwidth", part=part, unit="GB/s", bar=bar)
    device = "cuda" if part == "gpu" else "cpu"
    return Experiment((row,), _runner(shape, basis, device), (WorldPart(shape, basis),), 0, needs_gpu=part == "gpu")


def _runner(shape: Shape, basis: Basis, device: str) -> Callable[[Context, Mapping[str, Row]], Iterator[Row]]:
    def run(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
        experts = context.world.experts(shape, basis)
        # a GPU takes no notice of the number of threads
        copies = [f"copy {threads}" for threads in ((1, 2) if device == "cpu" else (1,))]
        runs = context.measure(
            Way("ours", lambda _: script("ours_live", experts=experts, device=device), [experts]),
            *(_copy(name, device) for name in copies),
        )
        (row,) = rows.values()
        yield filled(
            row, _rates(runs["ours"], moved_bytes(shape, basis)), best(*(rates(runs[name]) for name in copies))
        )

    return run


def _copy(name: str, device: str) -> Way:
    threads = int(name.split()[1])
    return Way(
        name,
        lambda _: script("memory_copy", num_bytes=_COPIED_BYTES, threads=threads, source=device, target=device),
    )


def _rates(runs: list[Run] | Exception, num_bytes: int) -> Figures:
    return runs if isinstance(runs, Exception) else [num_bytes / run.seconds / 1e9 for run in runs]
