"""Every row of a batch with a soup of its own, decoded: against PEFT's mixed batches, and against the bare base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from benchmarks.decoding import ROWS
from benchmarks.experiments.experiment import Context, Experiment, Figures, filled, megabytes, spans
from benchmarks.measure import Run, Way, script
from benchmarks.rows import Bar, Row
from benchmarks.shapes import SHAPES, Scale, Shape
from benchmarks.world import Part

Basis = Literal["free", "shared"]

# The shape of the base that ships with the package.
_EMBEDDED = SHAPES["embedded"]

_STEPS = 12
_MANY_STEPS = 200
_COMPARED = 3

_WORK = f"{ROWS} rows, {ROWS} profiles over six experts, decode"


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments at this scale; the GPU's is at the largest shape in bfloat16."""
    main = scale.main
    return [
        Experiment(_SMALL, _small, (Part(_EMBEDDED, "base"), Part(_EMBEDDED, "free")), 0),
        Experiment(_FREE, _free, (Part(main, "base"), Part(main, "free")), 0),
        Experiment(_SHARED, _shared, (Part(main, "base"), Part(main, "shared")), 0),
        Experiment(_WRAPPING, _wrapping, (Part(main, "base"), Part(main, "free")), 0),
        Experiment(_LINEAR, _linear, (Part(scale.large, "free"),), 0, needs_gpu=True),
        Experiment(_GPU, _gpu, (Part(scale.large, "free"),), 0, needs_gpu=True),
    ]


_SMALL = (
    Row(
        "mixing-embedded",
        f"the embedded base, {_WORK}",
        f"PEFT, {ROWS} adapters",
        unit="tok/s",
        bar=Bar("at least", 3),
    ),
    Row(
        "mixing-agreement",
        "the same, relative error of a row's logits",
        "its merged model, float64",
        unit="",
        bar=Bar("at most", 1e-5, unit=""),
    ),
    Row(
        "mixing-greedy",
        "the same, greedy answers that part from those alone without a near tie",
        "-",
        unit="",
        bar=Bar("at most", 0, unit=""),
    ),
    Row("mixing-embedded-base", "the same, decode", "the bare base", unit="tok/s"),
)
_FREE = (
    Row("mixing-peft", _WORK, f"PEFT, {ROWS} adapters", unit="tok/s", bar=Bar("at least", 1.4)),
    Row("mixing-base", "the same", "the bare base", unit="tok/s", bar=Bar("at least", 0.85)),
    Row("mixing-change", "the same, other profiles", "-", unit="ms", bar=Bar("below", 1, unit="ms")),
    Row("mixing-user", "the same, each further user", "-", unit="bytes", bar=Bar("below", 1000, unit="bytes")),
    Row("mixing-memory", "the same, RssAnon", "PEFT", unit="MB"),
)
_SHARED = (Row("mixing-shared", f"{_WORK}, shared basis", "the bare base", unit="tok/s", bar=Bar("at least", 0.9)),)
_WRAPPING = (Row("mixing-wrap", "six experts into a loaded base", "PEFT, load_adapter", bar=Bar("at least", 5)),)
_LINEAR = (
    Row(
        "mixing-gpu-linear",
        f"the linear layers of a decode step, {ROWS} rows, bfloat16, one CUDA graph: weights and A's in one product",
        "the bare base's",
        part="gpu",
        unit="ms",
    ),
    Row("mixing-gpu-linear-two", "the same, A's in a second product", "the bare base's", part="gpu", unit="ms"),
    Row("mixing-gpu-linear-layers", "the same, each layer by itself", "the bare base's", part="gpu", unit="ms"),
)
_GPU = (
    Row(
        "mixing-gpu",
        f"{_WORK}, bfloat16, CUDA graphs",
        "the bare base",
        part="gpu",
        unit="tok/s",
        bar=Bar("at least", 0.9),
    ),
)


def _small(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    folders = {"experts": context.world.experts(_EMBEDDED), "base": context.world.base(_EMBEDDED)}
    runs = context.measure(
        *_decoded(context, _EMBEDDED, "free", _MANY_STEPS),
        Way("peft", lambda _: script("peft_mixing", **folders, steps=_MANY_STEPS // 10)),
        Way("agreement", lambda _: script("mixing_agreement", **folders, rows=_COMPARED), most=1),
    )
    yield filled(rows["mixing-embedded"], _rates(runs["ours"]), _rates(runs["peft"]))
    yield filled(rows["mixing-agreement"], _reported("error")(runs["agreement"]))
    greedy = filled(rows["mixing-greedy"], _reported("unexplained")(runs["agreement"]))
    parted = _reported("parted")(runs["agreement"])
    yield greedy if isinstance(parted, Exception) else replace(greedy, note=f"{parted[0]:.0f} of {ROWS} part at all")
    yield filled(rows["mixing-embedded-base"], _rates(runs["ours"]), _rates(runs["bare"]))


def _free(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    shape = context.scale.main
    folders = {"experts": context.world.experts(shape), "base": context.world.base(shape)}
    runs = context.measure(
        *_decoded(context, shape, "free", _STEPS),
        Way("peft", lambda _: script("peft_mixing", **folders, steps=_STEPS // 2), most=3),
    )
    ours = runs["ours"]
    yield filled(rows["mixing-peft"], _rates(ours), _rates(runs["peft"]))
    yield filled(rows["mixing-base"], _rates(ours), _rates(runs["bare"]))
    yield filled(rows["mixing-change"], _reported("change_seconds", 1e3)(ours))
    yield filled(rows["mixing-user"], _reported("user_bytes")(ours))
    yield filled(rows["mixing-memory"], megabytes(ours), megabytes(runs["peft"]))


def _shared(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    runs = context.measure(*_decoded(context, context.scale.main, "shared", _STEPS))
    yield filled(rows["mixing-shared"], _rates(runs["ours"]), _rates(runs["bare"]))


def _wrapping(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    shape = context.scale.main
    folders = {"experts": context.world.experts(shape), "base": context.world.base(shape)}
    reads = list(folders.values())
    runs = context.measure(
        Way("ours", lambda _: script("ours_wrapping", **folders), reads),
        Way("peft", lambda _: script("peft_wrapping", **folders), reads),
    )
    yield filled(rows["mixing-wrap"], spans(runs["ours"]), spans(runs["peft"]))


def _linear(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    experts = context.world.experts(context.scale.large)
    arguments = {"config": context.scale.large.config(), "device": "cuda", "dtype": "bfloat16", "experts": experts}
    (runs,) = context.measure(Way("ways", lambda _: script("linear_layers", **arguments), [experts])).values()
    bare = _reported("bare", 1e3)(runs)
    for name, way in (("", "one"), ("-two", "two"), ("-layers", "layers")):
        yield filled(rows[f"mixing-gpu-linear{name}"], _reported(way, 1e3)(runs), bare)


def _gpu(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    shape = context.scale.large
    # no base of this shape is built: one of random values is made on the GPU
    arguments = {"config": shape.config(), "device": "cuda", "dtype": "bfloat16", "steps": 64}
    experts = context.world.experts(shape)
    runs = context.measure(
        Way("ours", lambda _: script("ours_mixing", **arguments, experts=experts), [experts]),
        Way("bare", lambda _: script("bare_mixing", **arguments)),
    )
    yield filled(rows["mixing-gpu"], _rates(runs["ours"]), _rates(runs["bare"]))


def _decoded(context: Context, shape: Shape, basis: Basis, steps: int) -> tuple[Way, Way]:
    base, experts = context.world.base(shape), context.world.experts(shape, basis)
    return (
        Way("ours", lambda _: script("ours_mixing", base=base, experts=experts, steps=steps), [base, experts]),
        Way("bare", lambda _: script("bare_mixing", base=base, steps=steps), [base]),
    )


def _reported(name: str, factor: float = 1.0) -> Callable[[list[Run] | Exception], Figures]:
    return lambda runs: runs if isinstance(runs, Exception) else [float(run.report[name]) * factor for run in runs]


_rates = _reported("tokens_per_second")
