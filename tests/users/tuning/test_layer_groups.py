"""Layers fall into contiguous groups, whose patterns say which modules they have."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from personalized_soups.errors import UsageError
from personalized_soups.users.tuning.layer_groups import layer_groups


def _modules(count: int) -> list[str]:
    # sorted as text: layer 10 comes before layer 2
    return sorted(f"model.layers.{layer}.{part}.proj" for layer in range(count) for part in ("mlp", "self_attn"))


def _group_of(module: str, groups: list[list[str]]) -> int:
    return next(index for index, group in enumerate(groups) if any(fnmatchcase(module, pattern) for pattern in group))


@pytest.mark.parametrize(
    ("count", "num_groups", "sizes"), [(12, 3, [4, 4, 4]), (12, 5, [3, 3, 2, 2, 2]), (2, 2, [1, 1]), (7, 1, [7])]
)
def test_groups_are_contiguous_and_of_equal_size(count: int, num_groups: int, sizes: list[int]) -> None:
    groups = layer_groups(_modules(count), num_groups)
    expected = [group for group, size in enumerate(sizes) for _ in range(size)]
    for part in ("mlp", "self_attn"):
        assert [_group_of(f"model.layers.{layer}.{part}.proj", groups) for layer in range(count)] == expected


def test_modules_without_a_number_are_in_the_last_group() -> None:
    groups = layer_groups([*_modules(4), "lm_head"], 2)
    assert _group_of("lm_head", groups) == 1


def test_only_layers_that_experts_adapt_are_counted() -> None:
    groups = layer_groups(["transformer.h.2.attn.c_attn", "transformer.h.9.attn.c_attn"], 2)
    assert groups == [["transformer.h.2.*"], ["transformer.h.9.*", "*"]]


@pytest.mark.parametrize("num_groups", [0, -1, 5])
def test_a_number_that_is_out_of_range_is_told(num_groups: int) -> None:
    with pytest.raises(
        UsageError, match=f"layer_groups is {num_groups}, but experts adapt 4 numbered layers"
    ) as caught:
        layer_groups(_modules(4), num_groups)
    assert caught.value.mend == "give a number from 1 to 4"


def test_a_model_without_numbered_layers_has_no_groups() -> None:
    with pytest.raises(UsageError, match="experts adapt 0 numbered layers") as caught:
        layer_groups(["lm_head"], 1)
    assert caught.value.mend == "leave out layer_groups"
