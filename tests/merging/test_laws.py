"""Laws that hold for any numbers, checked on dense deltas that the oracle computes from the written files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge
from tests import oracles
from tests.experts import SHAPES, write_expert

METHODS = ("linear", "factor_average", "factor_linear")


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    for index, name in enumerate("abc"):
        write_expert(tmp_path / "experts" / name, seed=index)
    write_expert(tmp_path / "experts" / "copy_of_a", seed=0)
    for index, name in enumerate(("shared_x", "shared_y")):
        write_expert(tmp_path / "experts" / name, seed=10 + index, a_seed=99)
    return ExpertLibrary.open(tmp_path / "experts")


def soup(library: ExpertLibrary, tmp_path: Path, weights: dict[str, float], **options: Any) -> dict[str, Any]:
    number = len(list(tmp_path.iterdir()))
    merged = merge(library, Profile(weights=weights), MergeOptions(**options))
    return oracles.deltas(merged.write(tmp_path / f"out{number}"))


def check_equal(one: dict[str, Any], two: dict[str, Any], tolerance: float = 3e-7) -> None:
    # each side owes a rounding or two of 2^-24 per product, relative to |B| |A|, about twice the delta's own norm
    assert one.keys() == two.keys()
    for module, delta in one.items():
        assert oracles.relative_error(delta, two[module]) < tolerance, module


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_of_weight_one_is_that_expert(library: ExpertLibrary, tmp_path: Path, method: str) -> None:
    check_equal(soup(library, tmp_path, {"a": 1.0}, method=method), oracles.deltas(library["a"].folder))


def test_an_expert_with_itself_is_that_expert(library: ExpertLibrary, tmp_path: Path) -> None:
    check_equal(soup(library, tmp_path, {"a": 0.5, "copy_of_a": 0.5}), oracles.deltas(library["a"].folder))


def test_factor_linear_inflates_an_expert_with_itself(library: ExpertLibrary, tmp_path: Path) -> None:
    """PEFT's `linear` gives twice the expert, so the law above can fail."""
    twice = soup(library, tmp_path, {"a": 0.5, "copy_of_a": 0.5}, method="factor_linear")
    check_equal(twice, {module: 2 * delta for module, delta in oracles.deltas(library["a"].folder).items()})


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_of_weight_zero_takes_no_part(library: ExpertLibrary, tmp_path: Path, method: str) -> None:
    options = MergeOptions(method=method)
    without = merge(library, Profile(weights={"a": 0.3, "b": 0.6}), options).write(tmp_path / "without")
    with_zero = merge(library, Profile(weights={"a": 0.3, "c": 0.0, "b": 0.6}), options).write(tmp_path / "with")
    name = "adapter_model.safetensors"
    assert (with_zero / name).read_bytes() == (without / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_experts_does_not_matter(library: ExpertLibrary, tmp_path: Path, method: str) -> None:
    options = MergeOptions(method=method)
    one = merge(library, Profile(weights={"a": 0.3, "b": -0.6, "c": 1.1}), options).write(tmp_path / "one")
    two = merge(library, Profile(weights={"c": 1.1, "a": 0.3, "b": -0.6}), options).write(tmp_path / "two")
    assert (one / "adapter_model.safetensors").read_bytes() == (two / "adapter_model.safetensors").read_bytes()


def test_linear_is_linear_in_the_weights(library: ExpertLibrary, tmp_path: Path) -> None:
    one = soup(library, tmp_path, {"a": 0.3, "b": -0.6})
    two = soup(library, tmp_path, {"b": 0.5, "c": 1.1})
    both = soup(library, tmp_path, {"a": 0.3, "b": -0.1, "c": 1.1})
    zero = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    check_equal({m: one.get(m, zero[m]) + two.get(m, zero[m]) for m in SHAPES}, both)


@pytest.mark.parametrize("method", ["linear", "factor_linear", "factor_average"])
def test_negated_weights_give_the_negated_soup(library: ExpertLibrary, tmp_path: Path, method: str) -> None:
    one = soup(library, tmp_path, {"a": 0.3, "b": 0.6}, method=method)
    two = soup(library, tmp_path, {"a": -0.3, "b": -0.6}, method=method)
    check_equal({module: -delta for module, delta in one.items()}, two)


def test_a_weight_can_be_split_over_two_copies(library: ExpertLibrary, tmp_path: Path) -> None:
    whole = soup(library, tmp_path, {"a": 0.9, "b": 0.4})
    split = soup(library, tmp_path, {"a": 0.7, "copy_of_a": 0.2, "b": 0.4})
    check_equal(whole, split)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, -0.2), (2.0, 3.0)])
def test_factor_average_is_linear_where_experts_share_a(
    library: ExpertLibrary, tmp_path: Path, weights: tuple[float, float]
) -> None:
    named = dict(zip(("shared_x", "shared_y"), weights, strict=True))
    check_equal(soup(library, tmp_path, named, method="factor_average"), soup(library, tmp_path, named), 1e-6)


def test_factor_average_is_not_linear_where_they_do_not(library: ExpertLibrary, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_equal(
            soup(library, tmp_path, {"a": 0.5, "b": 0.5}, method="factor_average"),
            soup(library, tmp_path, {"a": 0.5, "b": 0.5}),
            0.1,
        )


def test_truncation_to_the_full_rank_changes_nothing(library: ExpertLibrary, tmp_path: Path) -> None:
    weights = {"a": 0.3, "b": -0.6, "c": 1.1}
    check_equal(soup(library, tmp_path, weights, rank=12), soup(library, tmp_path, weights))
    check_equal(
        soup(library, tmp_path, {"a": 0.3, "b": 0.2, "shared_x": 1.0}, rank=8, method="factor_linear"),
        soup(library, tmp_path, {"a": 0.3, "b": 0.2, "shared_x": 1.0}, method="factor_linear"),
    )


def test_normalised_weights_are_divided_by_their_sum(library: ExpertLibrary, tmp_path: Path) -> None:
    folder = merge(library, Profile(weights={"a": 1.0, "b": 3.0}, normalize="sum")).write(tmp_path / "sum")
    check_equal(oracles.deltas(folder), soup(library, tmp_path, {"a": 0.25, "b": 0.75}))
