"""Many users at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.experiments.experiment import (
    Agreement,
    Context,
    Experiment,
    Figures,
    best,
    filled,
    megabytes,
    processes,
    rates,
    scaled,
    spans,
)
from benchmarks.measure import Way, script
from benchmarks.profiles import random_weights, write_lines
from benchmarks.rows import Bar, Row
from benchmarks.shapes import BYTES_OF, NUM_EXPERTS, Scale
from benchmarks.world import Part

_USERS = 16
_FEW = 4

_ROWS = (
    Row(
        "many-further",
        "merge_many, shared basis, each further user",
        "writing that file",
        bar=Bar("at most", 1.5),
    ),
    Row("many-process", f"psoups merge-many, {_USERS} users, whole process", "writing those files"),
    Row("many-memory", "the same, RssAnon", "-", unit="MB"),
    Row(
        "many-agreement",
        "merge_many, relative error of a delta",
        "float64",
        unit="",
        bar=Bar("at most", 1e-6, unit=""),
    ),
)
_ARITHMETIC = (
    Row(
        "many-arithmetic",
        f"merge_many, {_USERS} profiles, the arithmetic",
        "memory copy of the bytes that must move",
        unit="GB/s",
        bar=Bar("at least", 0.75),
    ),
)
_GPU_ARITHMETIC = (
    Row(
        "many-gpu-arithmetic",
        f"merge_many, {_USERS} profiles, the arithmetic",
        "memory copy on the GPU",
        part="gpu",
        unit="GB/s",
        bar=Bar("at least", 0.5),
    ),
)

_BANDWIDTH_BYTES = 1 << 30


def experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments at this scale."""
    parts = (Part(scale.main, "shared"),)
    scratch = scale.main.expert_bytes * (_FEW + _USERS)
    return [
        Experiment(_ROWS, _run, parts, scratch),
        Experiment(_ARITHMETIC, _run_arithmetic, (), 0),
        Experiment(_GPU_ARITHMETIC, _run_gpu_arithmetic, (), 0, needs_gpu=True),
    ]


def _run(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    experts = context.world.experts(context.scale.main, "shared")
    one = experts / "e0" / "adapter_model.safetensors"
    users = random_weights(_FEW + _USERS)
    last = list(users)[-1]
    agreement = Agreement({"more": {"experts": experts, "weights": users[last], "subfolder": last}})
    runs = context.measure(
        Way("few", lambda out: script("ours_many", experts=experts, count=_FEW, out=out), [experts]),
        Way("more", lambda out: script("ours_many", experts=experts, count=_FEW + _USERS, out=out), [experts]),
        Way("command", lambda out: _command_line(experts, out), [experts]),
        Way("write", lambda out: script("plain_write", file=one, count=_USERS, out=out), [one]),
        after=agreement,
    )
    written = spans(runs["write"])
    further = _further(spans(runs["few"]), spans(runs["more"]))
    yield filled(rows["many-further"], further, scaled(written, 1 / _USERS))
    yield filled(rows["many-process"], processes(runs["command"]), written)
    yield filled(rows["many-memory"], megabytes(runs["command"]))
    yield filled(rows["many-agreement"], agreement.of("more", runs["more"]))


def _command_line(experts: Path, out: Path) -> list[str]:
    profiles = write_lines(out.parent / "profiles.jsonl", _USERS)
    given = [str(profiles), "--experts", str(experts), "--out", str(out)]
    return [sys.executable, "-m", "personalized_soups", "merge-many", *given]


def _further(few: Figures, more: Figures) -> Figures:
    """Return the seconds of each user beyond the first few, turn by turn: what is done once cancels."""
    for each in (few, more):
        if isinstance(each, Exception):
            return each
    assert not isinstance(few, Exception)
    assert not isinstance(more, Exception)
    return [(long - short) / _USERS for short, long in zip(few, more, strict=True)]


def _run_arithmetic(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    values = context.scale.main.expert_bytes // BYTES_OF["F32"]
    # a copy reads and writes each byte once: half of what the product moves makes it move as much
    copied = (NUM_EXPERTS + _USERS) * values * BYTES_OF["F32"] // 2
    runs = context.measure(
        Way("ours", lambda _: script("many_arithmetic", experts=NUM_EXPERTS, users=_USERS, values=values)),
        *(_copy(f"copy {threads}", copied, threads) for threads in (1, 2)),
    )
    copies = best(rates(runs["copy 1"]), rates(runs["copy 2"]))
    yield filled(rows["many-arithmetic"], rates(runs["ours"]), copies)


def _copy(name: str, num_bytes: int, threads: int) -> Way:
    return Way(name, lambda _: script("memory_copy", num_bytes=num_bytes, threads=threads))


def _run_gpu_arithmetic(context: Context, rows: Mapping[str, Row]) -> Iterator[Row]:
    values = context.scale.main.expert_bytes // BYTES_OF["F32"]
    product = {"experts": NUM_EXPERTS, "users": _USERS, "values": values, "device": "cuda"}
    on_gpu = {"num_bytes": _BANDWIDTH_BYTES, "source": "cuda", "target": "cuda"}
    runs = context.measure(
        Way("product", lambda _: script("many_arithmetic", **product)),
        Way("copy", lambda _: script("memory_copy", **on_gpu)),
    )
    yield filled(rows["many-gpu-arithmetic"], rates(runs["product"]), rates(runs["copy"]))
