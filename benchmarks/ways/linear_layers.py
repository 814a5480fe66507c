"""All linear layers of one decode step: of the bare base, and of a mixed batch by each way of computing it.

Attention and norms are left out, so that nothing has to be compiled and all ways fit into one process. On a GPU the
calls are captured into one CUDA graph, as a compiled decode step is; elsewhere they are made one after another.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import decoding
from benchmarks.ways.missing import give_up
from personalized_soups.mixing.layers import grouping, weight_group
from personalized_soups.mixing.model import SoupModel

_ROUNDS = 9
_STEPS = 10

# The constants that each way changes, by module and name; None computes every layer separately.
_WAYS: Mapping[str, Mapping[tuple[Any, str], float] | None] = {
    "one": {(grouping, "_MOST_NUMBERS_ON_CPU"): 1 << 40},
    "two": {
        (grouping, "_MOST_NUMBERS_ON_CPU"): 1 << 40,
        (weight_group, "_ROOM"): 0,
        (weight_group, "_FEW_NUMBERS"): 0,
    },
    "layers": None,
}


def main(config: Mapping[str, Any], experts: str, device: str, dtype: str) -> None:
    """Print a step's seconds: `bare`; mixed with `one` product a group, with `two`, and each of the `layers` alone."""
    if device == "cuda" and not torch.cuda.is_available():
        give_up("no GPU here")
    model = decoding.made(config, device, dtype)
    inputs = _Inputs(model)
    seconds = {"bare": _seconds(lambda: _step(model, inputs), device)}
    for way, settings in _WAYS.items():
        with _set(settings or {}):
            soup = SoupModel(model, experts)
        with torch.no_grad(), soup.mixture(list(decoding.profiles())):
            if settings is None:
                for layer in soup.layers.by_name.values():
                    layer.group = None
            seconds[way] = _seconds(lambda: _step(model, inputs), device)
        soup.unload()
    print(json.dumps(seconds))


class _Inputs:
    """One token of each row, as the layers of a decoder layer are given it."""

    def __init__(self, model: Any) -> None:
        draw = torch.Generator(device=model.device).manual_seed(0)

        def random(width: int) -> Tensor:
            return torch.randn(decoding.ROWS, 1, width, generator=draw, device=model.device, dtype=model.dtype)

        config = model.config
        self.attention, self.mlp = random(config.hidden_size), random(config.hidden_size)
        self.output = random(config.num_attention_heads * config.head_dim)
        self.down = random(config.intermediate_size)


def _step(model: Any, inputs: _Inputs) -> None:
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.q_proj(inputs.attention)
        attention.k_proj(inputs.attention)
        attention.v_proj(inputs.attention)
        attention.o_proj(inputs.output)
        mlp.gate_proj(inputs.mlp)
        mlp.up_proj(inputs.mlp)
        mlp.down_proj(inputs.down)


def _seconds(step: Callable[[], None], device: str) -> float:
    """Return the median seconds of a step."""
    with torch.no_grad():
        run = _captured(step) if device == "cuda" else step
        rounds = []
        for _ in range(_ROUNDS + 1):
            start = time.perf_counter()
            for _ in range(_STEPS):
                run()
            if device == "cuda":
                torch.cuda.synchronize()
            rounds.append((time.perf_counter() - start) / _STEPS)
    return statistics.median(rounds[1:])  # the first round warms up


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are compiled before the capture
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


@contextmanager
def _set(settings: Mapping[tuple[Any, str], float]) -> Iterator[None]:
    before = {(module, name): getattr(module, name) for module, name in settings}
    for (module, name), value in settings.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
