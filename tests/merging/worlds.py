"""Small libraries of experts for property tests: hypothesis draws their structure, NumPy their numbers.

Nothing of the package has a part in them; what an expert adds is read back from its files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from personalized_soups.declare.profile import Profile
from tests import oracles
from tests.experts import write_adapter
from tests.oracles import Matrix

WEIGHTS_FILE = "adapter_model.safetensors"

# Set to a number to draw that many times as many examples, other ones in every run.
EXPLORE = int(os.environ.get("EXPLORE", "0"))


def examples(count: int) -> settings:
    """Return hypothesis's settings: the same examples in every run, so that a new failure is caused by a change.

    No deadline: a busy disk is no fault of the code's.
    """
    if EXPLORE:
        return settings(max_examples=count * EXPLORE, deadline=None)
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# One module each: tall, wide, square, of a single row, of a single column. Ranks go up to 5, above a side of some.
MODULES = {
    "model.layers.0.self_attn.q_proj": (13, 3),
    "model.layers.0.mlp.up_proj": (4, 21),
    "model.layers.1.self_attn.q_proj": (6, 6),
    "model.layers.1.mlp.gate": (1, 9),
    "model.layers.1.mlp.down_proj": (8, 1),
}


@dataclass(frozen=True)
class Expert:
    """The structure of one expert folder. Experts with the same number as `basis` have the same A's if shapes allow."""

    rank: int
    alpha: float
    basis: int
    a_dtype: str = "F32"
    b_dtype: str = "F32"
    is_rs: bool = False
    modules: tuple[str, ...] = tuple(MODULES)
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """Experts `e0`, `e1`, ... and their weights. If `is_exact`, all numbers are quarters, so no sum is rounded."""

    experts: tuple[Expert, ...]
    weights: tuple[float, ...]
    seed: int
    is_exact: bool = False

    @property
    def names(self) -> list[str]:
        return [f"e{index}" for index in range(len(self.experts))]

    def profile(self, **fields: Any) -> Profile:
        return Profile(weights=dict(zip(self.names, self.weights, strict=True)), **fields)

    def write(self, root: Path) -> list[Path]:
        return [write_expert(root / name, each, self, place) for place, (name, each) in enumerate(self.of_names())]

    def of_names(self) -> list[tuple[str, Expert]]:
        return list(zip(self.names, self.experts, strict=True))


class Part(NamedTuple):
    """An expert's share in one module, from its files: `scaling * b @ a`."""

    a: Matrix
    b: Matrix
    scaling: float

    @property
    def delta(self) -> Matrix:
        return self.scaling * (self.b @ self.a)


def write_expert(folder: Path, expert: Expert, world: World, place: int) -> Path:
    tensors: dict[str, tuple[str, Any]] = {}
    for module in expert.modules:
        out_features, in_features = MODULES[module]
        rank = expert.ranks.get(module, expert.rank)
        where = list(MODULES).index(module)
        a = numbers((world.seed, expert.basis, where, 0), (rank, in_features), is_exact=world.is_exact)
        b = numbers((world.seed, 100 + place, where, 1), (out_features, rank), is_exact=world.is_exact)
        tensors[f"base_model.model.{module}.lora_A.weight"] = (expert.a_dtype, a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (expert.b_dtype, b)
    patterns = {"rank_pattern": dict(expert.ranks), "alpha_pattern": dict(expert.alphas), "use_rslora": expert.is_rs}
    shapes = {module: MODULES[module] for module in expert.modules}
    # full names, since rank_pattern's keys are, and a layer may have the module and the next one lack it
    targets = sorted(expert.modules)
    return write_adapter(
        folder, tensors, rank=expert.rank, alpha=expert.alpha, shapes=shapes, target_modules=targets, **patterns
    )


def numbers(seed: Sequence[int], shape: tuple[int, ...], *, is_exact: bool) -> Matrix:
    random = np.random.default_rng(seed)
    return random.integers(-4, 5, size=shape) / 4 if is_exact else random.normal(size=shape) / 2


def write_base(folder: Path, dtype: str, seed: int = 0, *, shards: int = 1, is_exact: bool = False) -> Path:
    """Write a model that has every module and an embedding that no expert adapts, over `shards` files."""
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens": (5, 7), **MODULES}
    tensors = {
        f"{name}.weight": (dtype, numbers((seed, 999, place), shape, is_exact=is_exact))
        for place, (name, shape) in enumerate(shapes.items())
    }
    weight_map = {
        name: f"model-{place % shards + 1:05d}-of-{shards:05d}.safetensors" for place, name in enumerate(tensors)
    }
    for file in sorted(set(weight_map.values())):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        oracles.write_tensors(folder / file, part, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def parts_of(folder: Path) -> dict[str, Part]:
    """Return one expert's delta of each of its modules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for module, (a, b) in oracles.factors(oracles.read_tensors(folder / WEIGHTS_FILE)).items():
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        rank = config.get("rank_pattern", {}).get(module, config["r"])
        assert rank == len(a)
        found[module] = Part(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return found


def read_model(folder: Path) -> dict[str, Matrix]:
    return {
        name: tensor for path in folder.glob("*.safetensors") for name, tensor in oracles.read_tensors(path).items()
    }


# -3 to 3 and beyond: negative, zero, tiny, and large enough to drown the others
WEIGHTS = st.one_of(
    st.floats(-3, 3, allow_subnormal=False),
    st.sampled_from([0.0, 1.0, -1.0, 1e-6, -1e-20, 3e3, -40.0]),
)


@st.composite
def worlds(draw: st.DrawFn, *, dtypes: Sequence[str] = ("F32", "BF16", "F16", "F64")) -> World:
    """Draw experts that differ in everything in which experts may differ."""
    dtype = st.sampled_from(dtypes)
    common = draw(st.none() | dtype)
    experts = []
    for _ in range(draw(st.integers(1, 4))):
        modules = tuple(draw(st.sets(st.sampled_from(list(MODULES)), min_size=1).map(sorted)))
        some = st.sampled_from(modules)
        experts.append(
            Expert(
                rank=draw(st.integers(1, 5)),
                alpha=draw(st.sampled_from([1, 8, 0.5, 3])),
                basis=draw(st.integers(0, 2)),
                a_dtype=common or draw(dtype),
                b_dtype=common or draw(dtype),
                is_rs=draw(st.booleans()),
                modules=modules,
                ranks=draw(st.dictionaries(some, st.integers(1, 5), max_size=1)),
                alphas=draw(st.dictionaries(some, st.sampled_from([2, 24]), max_size=1)),
            )
        )
    weights = draw(st.tuples(*[WEIGHTS] * len(experts)).filter(any))
    return World(tuple(experts), weights, draw(st.integers(0, 2**16)))


@st.composite
def equal_worlds(draw: st.DrawFn, *, is_exact: bool = True, least: int = 1) -> World:
    """Draw experts that every method accepts: one rank and scaling, and weights in quarters that do not cancel."""
    rank, alpha = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 4, 16]))
    count = draw(st.integers(least, 3))
    experts = []
    for index in range(count):
        # the first has all modules, so that the soup's modules are always the same
        modules = st.sets(st.sampled_from(list(MODULES)), min_size=1).map(sorted).map(tuple)
        own = tuple(MODULES) if index == 0 else draw(modules)
        experts.append(Expert(rank=rank, alpha=alpha, basis=draw(st.integers(0, 3)), modules=own))
    quarters = st.integers(-8, 8).filter(bool).map(lambda number: number / 4)
    weights = draw(st.tuples(*[quarters] * count).filter(lambda found: abs(sum(found)) >= 0.25))
    return World(tuple(experts), weights, draw(st.integers(0, 2**16)), is_exact)
