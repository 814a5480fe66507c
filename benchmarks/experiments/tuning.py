"""Ten candidate weights on a user's history: in one mixed batch, against one candidate after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.experiments.experiment import Context, Experiment, Figures, filled
from benchmarks.measure import Run, Way, script
from benchmarks.rows import Bar, Row
from benchmarks.shapes import SHAPES, Scale
from benchmarks.world import Part

_EMBEDDED = SHAPES["embedded"]

_FEW = "one after another, batches of 8 items as PriME"
_WHOLE = "one after another, all 20 items at once"


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiment; it is the same at every scale."""
    return [Experiment(_ROWS, _run, (Part(_EMBEDDED, "free"),), 0)]


_ROWS = (
    Row(
        "tuning-answers",
        "10 candidates answer 20 prompts, up to 100 tokens, T=0.1, one batch",
        _FEW,
        bar=Bar("at least", 5),
    ),
    Row("tuning-answers-whole", "the same", _WHOLE),
    Row("tuning-likelihood", "log-likelihood of 20 texts with 10 candidates, batches of 64 rows", _FEW),
    Row("tuning-likelihood-whole", "the same", _WHOLE),
)


def _run(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    experts = context.world.experts(_EMBEDDED)
    runs = context.measure(Way("ours", lambda _: script("ours_tuning", experts=experts), most=3))["ours"]
    for name, ours, theirs in (
        ("tuning-answers", "answers", "answers_few"),
        ("tuning-answers-whole", "answers", "answers_whole"),
        ("tuning-likelihood", "likelihood", "likelihood_few"),
        ("tuning-likelihood-whole", "likelihood", "likelihood_whole"),
    ):
        yield filled(rows[name], _of(ours)(runs), _of(theirs)(runs))


def _of(name: str) -> Callable[[list[Run] | Exception], Figures]:
    return lambda runs: runs if isinstance(runs, Exception) else [float(run.report[name]) for run in runs]
