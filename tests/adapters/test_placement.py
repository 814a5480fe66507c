from __future__ import annotations

import pytest
import torch

from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.names import Kind
from personalized_soups.adapters.placement import (
    Placement,
    add_parts,
    blocks_of,
    of_blocks,
    place,
    scale_outputs,
    squared_norms,
)
from personalized_soups.methods.factors import Factors


def module(name: str, out_features: int, in_features: int, kind: Kind = "linear", blocks: int = 1) -> LoraModule:
    base = name if kind == "parameter" else f"{name}.weight"
    kernel = (3, 1) if kind == "conv" else ()
    return LoraModule(name, 4, in_features, out_features, 1.5, base, "a", "b", kind, blocks, kernel)


def factors(out_features: int, in_features: int, rank: int = 4) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return Factors(
        torch.randn(rank, in_features, dtype=torch.float64, generator=generator),
        torch.randn(out_features, rank, dtype=torch.float64, generator=generator),
        1.5,
    )


@pytest.mark.parametrize(
    ("kind", "blocks", "shape", "matrix_shape", "turned"),
    [
        ("linear", 1, (5, 6), (5, 6), False),
        ("transposed", 1, (5, 6), (5, 6), False),  # the base's shape counts, not what fan_in_fan_out says
        ("linear", 1, (6, 5), (6, 5), True),
        ("embedding", 1, (6, 5), (6, 5), True),
        ("conv", 1, (5, 2, 3, 1), (5, 6), False),
        ("parameter", 1, (5, 6), (5, 6), False),
        ("parameter", 1, (1, 5, 6), (5, 6), False),
        ("parameter", 2, (2, 5, 6), (10, 6), False),
        ("parameter", 2, (2, 6, 5), (12, 5), True),
    ],
)
def test_each_kind_stands_in_the_base_as_its_shape_says(
    kind: Kind, blocks: int, shape: tuple[int, ...], matrix_shape: tuple[int, int], turned: bool
) -> None:
    placements, faults = place([module("m", 5, 6, kind, blocks)], {"m.weight": shape, "m": shape})
    assert not faults
    assert placements["m"] == Placement("m" if kind == "parameter" else "m.weight", matrix_shape, turned, blocks)
    each = factors(5, 6, 4 * blocks)
    matrix = torch.zeros(matrix_shape, dtype=torch.float64)
    for start in range(0, matrix_shape[0], 3):  # blocks of rows that do not end where parts do
        add_parts(matrix[start : start + 3], placements["m"].parts(each), 2.0, start)
    a, b = each.a_RI.reshape(blocks, 4, 6), each.b_OR.reshape(5, 4, blocks)
    want = torch.einsum("ork,kri->kio" if turned else "ork,kri->koi", b, a)
    torch.testing.assert_close(matrix, 2 * want.reshape(matrix_shape))


@pytest.mark.parametrize(("kind", "shape"), [("linear", (5, 6)), ("linear", (6, 5)), ("embedding", (6, 5))])
def test_parts_copy_nothing(kind: Kind, shape: tuple[int, int]) -> None:
    (placement,) = place([module("m", 5, 6, kind)], {"m.weight": shape})[0].values()
    each = factors(5, 6)
    (part,) = placement.parts(each)
    pointers = {each.a_RI.data_ptr(), each.b_OR.data_ptr()}
    assert {part.left_MR.data_ptr(), part.right_RN.data_ptr()} == pointers


def test_parts_of_other_factors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not fit a matrix of shape \[5, 6\]"):
        Placement("m.weight", (5, 6), is_transposed=False).parts(factors(6, 5))
    with pytest.raises(ValueError, match="the rank 4 is not a multiple of the number of blocks 3"):
        Placement("m", (15, 6), is_transposed=False, blocks=3).parts(factors(5, 6))


def test_blocks_are_put_together_as_they_are_taken_apart() -> None:
    each = factors(5, 6, 12)
    blocks = blocks_of(each, 3)
    assert [block.rank for block in blocks] == [4, 4, 4]
    again = of_blocks(blocks)
    assert torch.equal(again.a_RI, each.a_RI)
    assert torch.equal(again.b_OR, each.b_OR)
    assert of_blocks(blocks_of(each, 1)) is each
    with pytest.raises(ValueError, match="different ranks"):
        of_blocks([blocks[0], factors(5, 6, 2)])


SQUARE = {"h.0.attn.c_proj.weight": (8, 8), "q.weight": (8, 8)}


def test_a_square_layer_follows_those_of_its_name_then_the_others_then_the_flag() -> None:
    shapes = {**SQUARE, "h.0.mlp.c_proj.weight": (32, 8), "head.weight": (20, 8), "dense.weight": (8, 20)}
    attention, mlp = module("h.0.attn.c_proj", 8, 8), module("h.0.mlp.c_proj", 8, 32)
    head, dense = module("head", 20, 8), module("dense", 20, 8)

    def turned(*modules: LoraModule) -> bool | None:
        placements, faults = place(modules, shapes)
        assert bool(faults) == (modules[0].name not in placements)
        return placements[modules[0].name].is_transposed if modules[0].name in placements else None

    assert turned(attention, mlp) is True
    assert turned(attention, mlp, head) is True
    # GPT-2's c_proj and its lm_head, whose fan_in_fan_out is the only one that PEFT saves: no evidence for [out, in]
    assert turned(attention, head) is None
    assert turned(attention) is None
    assert turned(module("h.0.attn.c_proj", 8, 8, "transposed")) is True
    assert turned(module("h.0.attn.c_proj", 8, 8, "transposed"), head) is None
    assert turned(module("q", 8, 8)) is False
    assert turned(module("q", 8, 8), head) is False
    assert turned(module("q", 8, 8), dense) is None
    assert turned(module("q", 8, 8), head, dense) is None


def test_a_square_parameter_follows_the_others() -> None:
    shapes = {"e.down": (2, 8, 8), "e.up": (2, 8, 16), "e.in": (2, 16, 8)}
    down = module("e.down", 8, 8, "parameter", 2)
    assert place([down, module("e.up", 16, 8, "parameter", 2)], shapes)[0]["e.down"].is_transposed
    assert not place([down, module("e.in", 16, 8, "parameter", 2)], shapes)[0]["e.down"].is_transposed
    placements, faults = place([down], shapes)
    assert not placements
    assert "e.down is square" in faults[0]


def test_every_fault_is_told() -> None:
    modules = [
        module("gone", 5, 6),
        module("other", 5, 6),
        module("expert", 5, 6, "parameter", 2),
        module("experts.up", 5, 6, "parameter", 2),
        module("q", 5, 6),
    ]
    shapes = {"other.weight": (5, 7), "expert": (3, 5, 6), "q.weight": (5, 6), "experts.0.up.weight": (5, 6)}
    placements, faults = place(modules, shapes)
    assert placements.keys() == {"q"}
    assert faults == [
        "gone.weight is not in the base",
        "other.weight: the base has shape [5, 7], but the adapter is for [5, 6] or [6, 5]",
        "expert: the base has shape [3, 5, 6], but the adapter is for [2, 5, 6] or [2, 6, 5]",
        "experts.up is not in the base (the base has one tensor per expert of the mixture, experts.0.*, "
        "which this version does not support)",
    ]


@pytest.mark.parametrize("axis", [0, 1])
def test_outputs_are_scaled_along_their_axis(axis: int) -> None:
    matrix = factors(5, 6).delta()
    norms = squared_norms(matrix, axis)
    torch.testing.assert_close(norms, (matrix**2).sum(1 - axis))
    if axis == 1:  # what blocks of rows add up to
        torch.testing.assert_close(squared_norms(matrix[:2], 1) + squared_norms(matrix[2:], 1), norms)
    scaled = matrix.clone()
    scale_outputs(scaled, norms, axis)
    torch.testing.assert_close(scaled, matrix * (norms[:, None] if axis == 0 else norms[None]))
