"""The server on the embedded base: many users at once, the first token, one user alone, the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.crowd import USERS
from benchmarks.experiments.experiment import Context, Experiment, Figures, filled
from benchmarks.measure import Run, Way, script
from benchmarks.rows import Bar, Row
from benchmarks.shapes import SHAPES, Scale
from benchmarks.world import Part

# Of the base that ships with the package.
_EMBEDDED = SHAPES["embedded"]

_WORK = f"{USERS} users at once over HTTP, each another profile"


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments; they are the same at every scale."""
    return [
        Experiment(_LOAD, _load, (Part(_EMBEDDED, "free"),), 0),
        Experiment(_PAGE, _page, (Part(_EMBEDDED, "free"),), 0),
    ]


_LOAD = (
    Row("serving-rate", _WORK, "one after another", part="serving", unit="tok/s", bar=Bar("at least", 5)),
    Row(
        "serving-parted",
        "the same, greedy answers that part from those alone without a near tie",
        "-",
        part="serving",
        unit="",
        bar=Bar("at most", 0, unit=""),
    ),
    Row(
        "serving-first",
        "the same, median time to the first token",
        "all prompts read at once, one step",
        part="serving",
        unit="ms",
        bar=Bar("at most", 1.5),
    ),
    Row(
        "serving-first-95",
        "the same, 95th percentile",
        "-",
        part="serving",
        unit="ms",
        bar=Bar("below", 500, unit="ms"),
    ),
    Row(
        "serving-alone",
        "one user at a time over HTTP, a token",
        "SoupModel.generate in process",
        part="serving",
        unit="ms",
        bar=Bar("at most", 1.25),
    ),
)
_PAGE = (
    Row(
        "playground-paint",
        "the playground, first paint",
        "-",
        part="serving",
        unit="ms",
        bar=Bar("below", 1000, unit="ms"),
    ),
    Row(
        "playground-bytes",
        "the playground, all that it loads",
        "-",
        part="serving",
        unit="bytes",
        bar=Bar("below", 100_000, "bytes"),
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
