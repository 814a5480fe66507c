"""The server on the embedded base: many users at once, the first token, one user alone, the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from benchmarks.crowd import USERS
from benchmarks.experiments.experiment import Context, Experiment, Figures, filled
from benchmarks.measure import Run, Way, script
from benchmarks.rows import Bar, Row
from benchmarks.shapes import SHAPES, Scale
from benchmarks.world import Part

# Of the base that ships with the package.
_EMBEDDED = SHAPES["embedded"]

_PARTED = "greedy answers that part from those alone without a near tie"
_FIRST = "time to the first token"
_READ = "all prompts read at once, one step"
_WORK = f"{USERS} users at once over HTTP, each another profile"


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments; they are the same at every scale."""
    return [
        Experiment(_LOAD, _load, (Part(_EMBEDDED, "free"),), 0),
        Experiment(_PAGE, _page, (Part(_EMBEDDED, "free"),), 0),
    ]


_row = partial(Row, part="serving")

_LOAD = (
    _row("serving-rate", _WORK, "one after another", unit="tok/s", bar=Bar("at least", 5)),
    _row("serving-parted", f"the same, {_PARTED}", "-", unit="", bar=Bar("at most", 0, unit="")),
    _row("serving-first", f"the same, median {_FIRST}", _READ, unit="ms", bar=Bar("at most", 1.5)),
    _row("serving-first-95", f"the same, 95th percentile of the {_FIRST}", "-", unit="ms", bar=Bar("below", 500, "ms")),
    _row(
        "serving-alone",
        "one user at a time over HTTP, a token",
        "SoupModel.generate in process",
        unit="ms",
        bar=Bar("at most", 1.25),
    ),
)
_PAGE = (
    _row("playground-paint", "the playground, first paint", "-", unit="ms", bar=Bar("below", 1000, "ms")),
    _row(
        "playground-bytes", "the playground, all that it loads", "-", unit="bytes", bar=Bar("below", 100_000, "bytes")
    ),
)


def _load(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    experts = context.world.experts(_EMBEDDED)
    runs = context.measure(
        Way("ours", lambda _: script("serving_load", experts=experts)),
        Way("floor", lambda _: script("serving_floor", experts=experts)),
    )
    ours, floor = runs["ours"], runs["floor"]
    yield filled(rows["serving-rate"], _told("tokens_per_second")(ours), _told("alone_tokens_per_second")(ours))
    yield filled(rows["serving-parted"], _told("unexplained")(ours))
    yield filled(rows["serving-first"], _told("first_median", 1e3)(ours), _told("first", 1e3)(floor))
    yield filled(rows["serving-first-95"], _told("first_95", 1e3)(ours))
    yield filled(rows["serving-alone"], _told("alone_seconds_per_token", 1e3)(ours), _told("per_token", 1e3)(floor))


def _page(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    runs = context.measure(Way("ours", lambda _: script("playground_paint", experts=context.world.experts(_EMBEDDED))))
    yield filled(rows["playground-paint"], _told("paint", 1e3)(runs["ours"]))
    yield filled(rows["playground-bytes"], _told("num_bytes")(runs["ours"]))


def _told(name: str, factor: float = 1.0) -> Callable[[list[Run] | Exception], Figures]:
    def figures(runs: list[Run] | Exception) -> Figures:
        return runs if isinstance(runs, Exception) else [run.report[name] * factor for run in runs]

    return figures
