"""Soups of every kind of expert, in every encoding, against dense float64 computed from the files.

Examples are the same in every run, so that a failure is a change's own. To search further:
`EXPLORE=10 .venv/bin/pytest tests/merging/test_properties.py` draws others, ten times as many.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from personalized_soups import ExpertLibrary, MergeOptions, merge, merge_into_base
from personalized_soups.methods.table import METHODS
from tests import oracles
from tests.merging.formulas import soup_of
from tests.merging.worlds import (
    MODULES,
    WEIGHTS_FILE,
    Expert,
    Part,
    World,
    equal_worlds,
    examples,
    parts_of,
    read_model,
    worlds,
    write_base,
)
from tests.oracles import Matrix

U = 2.0**-24  # float32's half ulp, relative
DETERMINISTIC = [name for name, row in METHODS.items() if not row.is_random]

Parts = Sequence[Mapping[str, Part]]


def written(root: Path, world: World) -> tuple[ExpertLibrary, Parts]:
    folders = world.write(root / "experts")
    return ExpertLibrary.open(root / "experts"), [parts_of(folder) for folder in folders]


def magnitudes(parts: Parts, weights: Sequence[float]) -> dict[str, Matrix]:
    """Return `sum |w s| |B| |A|` of each module, the unit of the derived bound."""
    found: dict[str, Matrix] = {}
    for each, weight in zip(parts, weights, strict=True):
        for module, part in each.items() if weight else ():
            size = abs(weight * part.scaling) * (np.abs(part.b) @ np.abs(part.a))
            found[module] = found.get(module, np.zeros_like(size)) + size
    return found


def linear(parts: Parts, weights: Sequence[float]) -> dict[str, Matrix]:
    taking_part = [(each, weight) for each, weight in zip(parts, weights, strict=True) if weight]
    return soup_of("linear", [each for each, _ in taking_part], [weight for _, weight in taking_part], 1.0, 1.0)


def dtype_in(folder: Path) -> str:
    (dtype,) = {kind for kind, _, _ in oracles.raw_tensors(folder / WEIGHTS_FILE).values()}
    return dtype


def room_of(delta: Matrix, size: Matrix) -> float:
    """The norm against which 1e-6 is owed: the delta's; where terms cancel, a sixteenth of theirs (1e-6 / 16 is u)."""
    return max(float(np.linalg.norm(delta)), float(np.linalg.norm(size)) / 16)


@examples(60)
@given(world=worlds())
def test_a_stacked_soup_owes_a_rounding_of_b_and_none_where_float32_holds_it(world: World) -> None:
    """A is copied and each entry of B is rounded once: half an ulp of |w s| |B| |A|.

    Factors in float64 are rounded to float32 when they are read: one more rounding of A and of B. 2^-40 is the oracle's
    own; of B's below the smallest normal number the smallest subnormal is owed, times A.
    """
    with tempfile.TemporaryDirectory() as name:
        library, parts = written(Path(name), world)
        out = merge(library, world.profile()).write(Path(name) / "out")
        got, dtype = oracles.deltas(out), dtype_in(out)
        factors = oracles.factors(oracles.read_tensors(out / WEIGHTS_FILE))
    want, size = linear(parts, world.weights), magnitudes(parts, world.weights)
    own = {kind for each in world.experts for kind in (each.a_dtype, each.b_dtype)}
    taken = {k for e, w in zip(world.experts, world.weights, strict=True) if w for k in (e.a_dtype, e.b_dtype)}
    assert dtype == (taken.pop() if len(taken) == 1 and taken <= {"BF16", "F16"} else "F32")
    share = oracles.HALF_ULP[dtype] + (2 * U if "F64" in own else 0) + 2.0**-40
    assert got.keys() == want.keys()
    for module, delta in want.items():
        note(f"{module} {dtype}")
        bound = share * (1 + U) * size[module] + oracles.SMALLEST[dtype] * np.abs(factors[module][0]).sum(axis=0)
        error = np.abs(got[module] - delta)
        assert (error <= bound).all()
        if dtype == "F32" and "F64" not in own:
            assert np.linalg.norm(error) <= 1e-6 * room_of(delta, size[module])


@examples(60)
@given(world=worlds(), cut=st.integers(1, 8) | st.sampled_from([0.3, 0.9, 0.999, 1.0]))
def test_a_truncated_soup_is_the_best_at_its_rank_and_an_energy_share_takes_the_least(world: World, cut: float) -> None:
    """`|dW - got|` is the error of the best approximation (Eckart-Young), plus the rounding of the two factors.

    A relative rounding u of each moves their product by at most 2 u |B| |A|, in norm 2 u |B|_F |A|_F; what underflows
    by t an entry, by t (sqrt(O R) |A|_F + sqrt(R I) |B|_F).
    """
    keywords: dict[str, Any] = {"rank": cut} if isinstance(cut, int) else {"energy": cut}
    with tempfile.TemporaryDirectory() as name:
        library, parts = written(Path(name), world)
        out = merge(library, world.profile(), MergeOptions(**keywords)).write(Path(name) / "out")
        got, dtype = oracles.deltas(out), dtype_in(out)
        record = json.loads((out / "soup.json").read_text())
        factors = oracles.factors(oracles.read_tensors(out / WEIGHTS_FILE))
    want, size = linear(parts, world.weights), magnitudes(parts, world.weights)
    for module, delta in want.items():
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        above = max(float(np.linalg.norm(size[module])), 1e-300)
        kept = len(factors[module][0])
        if isinstance(cut, float):
            # what is kept makes up the share, and one rank less would not; the oracle knows the squares to 1e-13
            noise = 1e-13 * above**2
            note(f"{module}: {squares} at rank {kept}")
            assert squares[:kept].sum() >= cut * squares.sum() - noise
            assert squares[: kept - 1].sum() < cut * squares.sum() + noise or kept == 1
        tail = float(np.sqrt(squares[kept:].sum()))
        half, smallest = oracles.HALF_ULP[dtype], oracles.SMALLEST[dtype]
        norms = [float(np.linalg.norm(factor)) + smallest * factor.size**0.5 for factor in factors[module]]
        underflow = sum(norm * (kept * side) ** 0.5 for norm, side in zip(norms, MODULES[module], strict=True))
        rounding = 2.1 * half * math.prod(norms) + smallest * underflow
        reading = 3 * U * above if any("F64" in (e.a_dtype, e.b_dtype) for e in world.experts) else 1e-13 * above
        assert abs(np.linalg.norm(got[module] - delta) - tail) <= rounding + reading
        if record["truncation"] and np.sqrt(squares.sum()) > 1e-6 * above:
            recorded = record["truncation"]["modules"][module]
            assert recorded == pytest.approx(
                tail / np.sqrt(squares.sum()), abs=1e-5 if reading > 1e-9 * above else 1e-6
            )


@examples(60)
@given(world=worlds(), dtype=st.sampled_from(["F32", "BF16", "F16", "F64"]), shards=st.integers(1, 3))
def test_every_element_of_a_folded_model_is_within_the_derived_bound(world: World, dtype: str, shards: int) -> None:
    """|err| <= ulp/2 + (K + 2) 2^-24 (|W| + sum |w s| |B| |A|); factors in float64 are read in float32: 2 more."""
    with tempfile.TemporaryDirectory() as name:
        library, parts = written(Path(name), world)
        base = write_base(Path(name) / "base", dtype, world.seed, shards=shards)
        out = merge_into_base(library, world.profile(), base, Path(name) / "out")
        before, after = read_model(base), read_model(out)
    want, size = linear(parts, world.weights), magnitudes(parts, world.weights)
    assert before.keys() == after.keys()
    ulp, smallest = (oracles.HALF_ULP | {"F64": 2.0**-53})[dtype], (oracles.SMALLEST | {"F64": 0.0})[dtype]
    for tensor, w in before.items():
        module = tensor.removesuffix(".weight")
        if module not in want:
            np.testing.assert_array_equal(after[tensor], w)
            continue
        num_terms = sum(len(each[module].a) for each in parts if module in each)
        accumulated = (num_terms + 4) * U * (np.abs(w) + size[module])
        merged = w + want[module]
        rounding = 0.0 if dtype == "F32" else ulp * (np.abs(merged) + accumulated)
        error = np.abs(after[tensor] - merged)
        assert (error <= accumulated + rounding + smallest).all(), module
        if dtype in {"F32", "F64"}:
            assert np.linalg.norm(error) <= 1e-6 * room_of(merged, np.abs(w) + size[module])


def options_of(method: str, density: float, lambda_: float) -> dict[str, float]:
    given = {"density": density, "lambda": lambda_}
    return {name: value for name, value in given.items() if name in METHODS[method].options}


def check_method(method: str, world: World, density: float, lambda_: float) -> None:
    """Compare a method with its formula, as an adapter of full rank and folded into a base.

    Every number of an exact world is dyadic, so that no election and no threshold hangs on a rounding. What is left:
    four roundings of float32 in an entry's sum, of terms that are below `scale`; the factors' own rounding, at most
    2 u times the sum of the singular values, which is at most sqrt(rank) times the norm; and KnOTS' factors alike.
    """
    row = METHODS[method]
    keywords: dict[str, Any] = {"method": method, "method_options": options_of(method, density, lambda_)}
    with tempfile.TemporaryDirectory() as name:
        library, parts = written(Path(name), world)
        base = write_base(Path(name) / "base", "F32", world.seed, is_exact=world.is_exact)
        full: dict[str, Any] = {"rank": max(min(shape) for shape in MODULES.values())} if row.family == "dense" else {}
        adapter = oracles.deltas(
            merge(library, world.profile(), MergeOptions(**keywords, **full)).write(Path(name) / "adapter")
        )
        before = read_model(base)
        after = read_model(
            merge_into_base(library, world.profile(), base, Path(name) / "model", MergeOptions(**keywords))
        )
    want = soup_of(method, parts, world.weights, density, options_of(method, density, lambda_).get("lambda", 1.0))
    assert adapter.keys() == want.keys()
    for module, delta in want.items():
        norm = float(np.linalg.norm(delta))
        weighed = [
            abs(w) * np.abs(each[module].delta) for each, w in zip(parts, world.weights, strict=True) if module in each
        ]
        # the factor methods' own terms and cross terms, bounded by what their factors could make without any sign
        terms = magnitudes(parts, world.weights)[module] * len(weighed) if row.family == "factor" else sum(weighed)
        scale = float(np.linalg.norm(terms)) * (lambda_ if "lambda" in row.options else 1.0)
        w = before[f"{module}.weight"]
        assert np.linalg.norm(adapter[module] - delta) <= 1e-6 * norm + 6 * U * scale, module
        assert np.linalg.norm(after[f"{module}.weight"] - w - delta) <= 1e-6 * norm + 6 * U * (
            scale + np.linalg.norm(w)
        )
        assert norm == 0 or scale < 1e4 * norm  # the bound would see another formula


@pytest.mark.parametrize("method", [name for name in DETERMINISTIC if name != "knots"])
@examples(12)
@given(world=equal_worlds(), density=st.sampled_from([0.2, 0.5, 0.75, 1.0]), lambda_=st.sampled_from([1.0, 0.75, 2.5]))
def test_every_method_that_draws_nothing_is_its_formula(
    method: str, world: World, density: float, lambda_: float
) -> None:
    check_method(method, world, density, lambda_)


@examples(25)
@given(
    world=equal_worlds(is_exact=False),
    density=st.sampled_from([0.2, 0.5, 0.75, 1.0]),
    lambda_=st.sampled_from([1.0, 0.75, 2.5]),
)
def test_knots_is_its_formula(world: World, density: float, lambda_: float) -> None:
    """KnOTS has a unique basis only if the singular values differ. Random ones do; dyadic ones may not."""
    check_method("knots", world, density, lambda_)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "knots", "factor_linear"])
def test_a_soup_is_turned_where_the_base_is(tmp_path: Path, method: str) -> None:
    """GPT-2's Conv1D stores [in, out], so dense deltas and factors are added transposed."""
    world = World((Expert(3, 6, 0), Expert(3, 6, 1)), (0.5, -1.5), 2)
    library, _ = written(tmp_path, world)
    options = {name: 1.0 for name in METHODS[method].options if name in {"density", "lambda"}}
    found = []
    for turned in (False, True):
        base = write_base(tmp_path / f"base{turned}", "F32", 7)
        for path in base.glob("*.safetensors") if turned else ():
            oracles.write_tensors(path, {name: ("F32", w.T) for name, w in oracles.read_tensors(path).items()})
        out = tmp_path / f"out{turned}"
        found.append(
            read_model(
                merge_into_base(
                    library, world.profile(), base, out, MergeOptions(method=method, method_options=options)
                )
            )
        )
    for name, tensor in found[0].items():
        # the products' sums may be taken in another order
        np.testing.assert_allclose(found[1][name].T, tensor, rtol=0, atol=16 * U * 30, err_msg=name)


def test_the_check_of_a_method_sees_another_methods_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tuple(Expert(2, 4, index) for index in range(3)), (1.0, 0.5, -0.25), 3, is_exact=True)
    check_method("ties", world, 0.5, 1.0)
    true_formula = soup_of
    monkeypatch.setitem(globals(), "soup_of", lambda _method, *rest: true_formula("ties@peft", *rest))
    with pytest.raises(AssertionError):
        check_method("ties", world, 0.5, 1.0)
