"""Experts to one adapter: exact, truncated, and large."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.experiments.experiment import (
    Agreement,
    Context,
    Experiment,
    filled,
    megabytes,
    processes,
    scaled,
    spans,
)
from benchmarks.measure import Run, Way, script
from benchmarks.profiles import SIX, THREE, as_option
from benchmarks.rows import Bar, Row
from benchmarks.shapes import NUM_EXPERTS, RANK, Scale
from benchmarks.world import Part

_EXACT = (
    Row("adapter-span", "three experts to one adapter, without imports", "PEFT, the same span", bar=Bar("at least", 8)),
    Row("adapter-process", "the same, whole process", "PEFT, whole process", bar=Bar("at least", 2.5)),
    Row(
        "adapter-agreement",
        "the same, relative error of a delta",
        "float64",
        unit="",
        bar=Bar("at most", 1e-6, unit=""),
    ),
)
_LARGE = (
    Row(
        "adapter-memory",
        "six 8B experts to one adapter, RssAnon",
        "-",
        unit="MB",
        bar=Bar("below", 500, unit="MB"),
    ),
    Row("adapter-large", "the same, whole process", "writing the bytes"),
)
_TRUNCATED = (
    Row(
        "truncated-span",
        "three experts truncated to rank 16, without imports",
        "PEFT svd, one layer x layers",
        bar=Bar("at least", 100),
    ),
    Row(
        "truncated-agreement",
        "the same, relative error of a delta",
        "float64",
        unit="",
        bar=Bar("at most", 1e-5, unit=""),
    ),
)


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments at this scale."""
    main, large = scale.main, scale.large
    parts = (Part(main, "base"), Part(main, "free"))
    return [
        Experiment(_EXACT, _run_exact, parts, main.expert_bytes * len(THREE)),
        Experiment(_LARGE, _run_large, (Part(large, "free"),), large.expert_bytes * len(SIX)),
        Experiment(_TRUNCATED, _run_truncated, parts, main.expert_bytes),
    ]


def command_line(experts: Path, weights: Mapping[str, float], out: Path, *options: str) -> list[str]:
    """Return the command that merges experts, as a user types it."""
    given = ["--weights", as_option(weights), "--experts", str(experts), "--out", str(out)]
    return [sys.executable, "-m", "personalized_soups", "merge", *given, *options]


def _run_exact(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    shape = context.scale.main
    experts, base = context.world.experts(shape), context.world.base(shape)
    arguments: dict[str, object] = {"experts": experts, "weights": dict(THREE)}
    agreement = Agreement({"ours": arguments})
    runs = context.measure(
        Way("ours", lambda out: script("ours_adapter", **arguments, out=out), [experts]),
        Way("command", lambda out: command_line(experts, THREE, out), [experts]),
        Way("peft", lambda out: script("peft_adapter", **arguments, base=base, out=out), [experts, base]),
        after=agreement,
    )
    yield filled(rows["adapter-span"], spans(runs["ours"]), spans(runs["peft"]))
    yield filled(rows["adapter-process"], processes(runs["command"]), processes(runs["peft"]))
    yield filled(rows["adapter-agreement"], agreement.of("ours", runs["ours"]))


def _run_large(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    experts = context.world.experts(context.scale.large)
    one = experts / "e0" / "adapter_model.safetensors"
    runs = context.measure(
        Way("command", lambda out: command_line(experts, SIX, out), [experts]),
        Way("write", lambda out: script("plain_write", file=one, count=NUM_EXPERTS, out=out), [one]),
    )
    yield filled(rows["adapter-memory"], megabytes(runs["command"]))
    yield filled(rows["adapter-large"], processes(runs["command"]), spans(runs["write"]))


def _run_truncated(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    shape = context.scale.main
    experts, base = context.world.experts(shape), context.world.base(shape)
    arguments: dict[str, object] = {"experts": experts, "weights": dict(THREE), "rank": RANK}
    agreement = Agreement({"ours": arguments})
    runs = context.measure(
        Way("ours", lambda out: script("ours_adapter", **arguments, out=out), [experts]),
        Way("peft", lambda _: script("peft_svd", **arguments, base=base), [experts, base], most=1),
        after=agreement,
    )
    yield filled(rows["truncated-span"], spans(runs["ours"]), scaled(spans(runs["peft"]), _layers(runs["peft"])))
    yield filled(rows["truncated-agreement"], agreement.of("ours", runs["ours"]))


def _layers(runs: list[Run] | Exception) -> int:
    return 1 if isinstance(runs, Exception) else int(runs[0].report["layers"])
