"""Experts into their base: a full model folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks import mergekit
from benchmarks.experiments.adapter import command_line
from benchmarks.experiments.experiment import (
    Agreement,
    Context,
    Experiment,
    Figures,
    filled,
    megabytes,
    processes,
    spans,
)
from benchmarks.measure import MissingError, Run, Way, median, script
from benchmarks.profiles import THREE
from benchmarks.rows import Bar, Row
from benchmarks.shapes import Scale
from benchmarks.world import Part

_ROWS = (
    Row(
        "base-process",
        "three experts into the base, whole process",
        "PEFT merge_and_unload + save",
        bar=Bar("at least", 4),
    ),
    Row("base-mergekit", "the same", f"mergekit {mergekit.VERSION} linear", bar=Bar("at least", 12)),
    Row("base-span", "the same, without imports", "cp -r of the base", bar=Bar("at most", 3.5)),
    Row("base-memory", "the same, RssAnon", "PEFT", unit="MB", bar=Bar("below", 700, unit="MB")),
    Row("base-memory-mergekit", "the same, RssAnon", "mergekit", unit="MB"),
    Row(
        "base-agreement",
        "the same, an element's share of the bound",
        "float64",
        unit="",
        bar=Bar("at most", 1, unit=""),
    ),
)
_DEEP = (
    Row(
        "base-memory-deep",
        "a base four times as deep, RssAnon",
        "-",
        unit="MB",
        bar=Bar("below", 700, unit="MB"),
    ),
    Row("base-process-deep", "the same, whole process", "cp -r of that base"),
)
_GPU = (
    Row("base-gpu", "three experts into the base, without imports", "bytes over PCIe bandwidth", part="gpu"),
    Row("base-gpu-cp", "the same", "cp -r of the base", part="gpu"),
)

# Gigabytes are written in each run, and it is the memory that is asked for, which hardly differs between runs.
_MOST_DEEP = 3

# Where a bandwidth is measured: large against every cache.
_BANDWIDTH_BYTES = 1 << 30


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments at this scale."""
    main, deep = scale.main, scale.deep
    parts = (Part(main, "base"), Part(main, "free"))
    # mergekit keeps a folded base for each expert next to its output
    scratch = main.base_bytes * (len(THREE) + 1)
    return [
        Experiment(_ROWS, _run, parts, scratch),
        Experiment(_DEEP, _run_deep, (Part(deep, "base"), Part(deep, "free")), deep.base_bytes),
        Experiment(_GPU, _run_gpu, parts, main.base_bytes, needs_gpu=True),
    ]


def _run(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    shape = context.scale.main
    experts, base = context.world.experts(shape), context.world.base(shape)
    arguments: dict[str, object] = {"experts": experts, "weights": dict(THREE), "base": base}
    inputs = [experts, base]
    agreement = Agreement({"ours": arguments})
    ways = [
        Way("ours", lambda out: script("ours_into_base", **arguments, out=out), inputs),
        Way("command", lambda out: command_line(experts, THREE, out, "--into-base", str(base)), inputs),
        Way("cp", lambda out: ["cp", "-r", "--reflink=never", str(base), str(out)], [base]),
        Way("peft", lambda out: script("peft_into_base", **arguments, out=out), inputs),
    ]
    environment = context.world.mergekit
    refused: Exception | None = None
    try:
        context.say("install mergekit")
        mergekit.install(environment)
        ways.append(Way("mergekit", lambda out: mergekit.command(environment, base, experts, THREE, out), inputs))
    except MissingError as error:
        refused = error
    runs: dict[str, list[Run] | Exception] = context.measure(*ways, after=agreement)
    if refused is not None:
        runs["mergekit"] = refused
    ours = runs["command"]
    yield filled(rows["base-process"], processes(ours), processes(runs["peft"]))
    yield filled(rows["base-mergekit"], processes(ours), processes(runs["mergekit"]))
    yield filled(rows["base-span"], spans(runs["ours"]), processes(runs["cp"]))
    yield filled(rows["base-memory"], megabytes(ours), megabytes(runs["peft"]))
    yield filled(rows["base-memory-mergekit"], megabytes(ours), megabytes(runs["mergekit"]))
    yield filled(rows["base-agreement"], agreement.of("ours", runs["ours"]))


def _run_deep(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    shape = context.scale.deep
    experts, base = context.world.experts(shape), context.world.base(shape)
    runs = context.measure(
        Way(
            "command",
            lambda out: command_line(experts, THREE, out, "--into-base", str(base)),
            [experts, base],
            most=_MOST_DEEP,
        ),
        Way("cp", lambda out: ["cp", "-r", "--reflink=never", str(base), str(out)], [base], most=_MOST_DEEP),
    )
    yield filled(rows["base-memory-deep"], megabytes(runs["command"]))
    yield filled(rows["base-process-deep"], processes(runs["command"]), processes(runs["cp"]))


def _run_gpu(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    shape = context.scale.main
    experts, base = context.world.experts(shape), context.world.base(shape)
    arguments: dict[str, object] = {"experts": experts, "weights": dict(THREE), "base": base, "device": "cuda"}
    runs = context.measure(
        Way("ours", lambda out: script("ours_into_base", **arguments, out=out), [experts, base]),
        Way("cp", lambda out: ["cp", "-r", "--reflink=never", str(base), str(out)], [base]),
        Way("there", lambda _: script("memory_copy", num_bytes=_BANDWIDTH_BYTES, target="cuda")),
        Way("back", lambda _: script("memory_copy", num_bytes=_BANDWIDTH_BYTES, source="cuda")),
    )
    yield filled(rows["base-gpu"], spans(runs["ours"]), _crossing(runs["there"], runs["back"], shape.base_bytes))
    yield filled(rows["base-gpu-cp"], spans(runs["ours"]), processes(runs["cp"]))


def _crossing(there: list[Run] | Exception, back: list[Run] | Exception, num_bytes: int) -> Figures:
    """Return the seconds in which so many bytes cross to the GPU while as many come back: the slower way decides."""
    for each in (there, back):
        if isinstance(each, Exception):
            return each
    assert not isinstance(there, Exception)
    assert not isinstance(back, Exception)
    slower = min(median(run.report["bytes_per_second"] for run in each) for each in (there, back))
    return [num_bytes / slower]
