from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from personalized_soups import ExpertLibrary, MergeOptions, Profile
from personalized_soups.declare.loader import load_text
from personalized_soups.errors import (
    DeclarationError,
    FileFormatError,
    IncompatibleExpertsError,
    InputError,
    UnsupportedAdapterError,
    UsageError,
)
from personalized_soups.merging.planning.plan import MergePlan
from personalized_soups.merging.planning.planner import plan_merge
from personalized_soups.merging.planning.vllm import VLLM_RANKS
from personalized_soups.methods.method import Method
from tests.experts import SHAPES, write_config, write_expert, write_record


def plan_of(
    root: Path, weights: dict[str, float] | None = None, *, into_base: bool = False, **options: Any
) -> MergePlan:
    library = ExpertLibrary.open(root)
    profile = Profile(weights=weights or dict.fromkeys(library, 0.5))
    return plan_merge(library, profile, MergeOptions(**options), into_base=into_base)


def test_a_plan_says_what_will_be_done(tmp_path: Path) -> None:
    write_expert(tmp_path / "a", rank=4, seed=1)
    write_expert(tmp_path / "b", rank=2, seed=2, shapes={"model.layers.0.mlp.up_proj": (96, 64)})
    plan = plan_of(tmp_path, {"a": 0.5, "b": -1.0}, rank=5)
    assert plan.encoding == "truncated"
    assert plan.rank == 5
    assert [(module.full_rank, module.rank) for module in plan.modules if "layers.0.mlp.up" in module.name] == [(6, 5)]
    assert {module.rank for module in plan.modules if "layers.1" in module.name} == {4}
    text = "\n".join(plan.lines())
    assert "0.5 a + -1 b" in text
    assert "truncated, rank 5" in text
    assert "--max-lora-rank 8" in text
    numbers = sum(5 * (out + into) for out, into in SHAPES.values())
    assert plan.num_bytes == 4 * numbers


@pytest.mark.parametrize(("rank", "want"), [(1, 1), (2, 8), (16, 16), (257, 320), (512, 512), (513, None)])
def test_the_smallest_vllm_rank_that_fits(tmp_path: Path, rank: int, want: int | None) -> None:
    write_expert(tmp_path / "a", rank=rank, shapes={"m.q_proj": (4, 4)})
    plan = plan_of(tmp_path)
    assert plan.vllm_max_lora_rank == want
    assert want is None or want in VLLM_RANKS


def test_an_unknown_expert_is_told_with_file_line_and_nearest_name(tmp_path: Path) -> None:
    write_expert(tmp_path / "friendly")
    profile = load_text("user: me\nweights:\n  freindly: 0.5\n", Profile, "me.yaml")
    with pytest.raises(DeclarationError, match="no expert is called 'freindly'") as caught:
        plan_merge(ExpertLibrary.open(tmp_path), profile)
    assert caught.value.where == "me.yaml:3: weights.freindly"
    assert caught.value.mend == "did you mean 'friendly'?"


def test_opposed_sides_need_permission(tmp_path: Path) -> None:
    for name in ("friendly", "unfriendly"):
        write_expert(tmp_path / name, seed=len(name))
        write_record(tmp_path / name, dimension="style")
    weights = {"friendly": 0.5, "unfriendly": 0.5}
    with pytest.raises(DeclarationError, match="two sides of one dimension, 'style'"):
        plan_of(tmp_path, weights)
    allowed = Profile(weights=weights, allow_opposed=True)
    assert len(plan_merge(ExpertLibrary.open(tmp_path), allowed).experts) == 2


def test_all_broken_experts_are_told_at_once(tmp_path: Path) -> None:
    for index, name in enumerate("abc"):
        write_expert(tmp_path / name, seed=index)
    write_config(tmp_path / "a", use_dora=True)
    (tmp_path / "c" / "adapter_model.safetensors").write_bytes(b"1234")
    with pytest.raises(InputError, match="2 errors") as caught:
        plan_of(tmp_path)
    assert "use_dora" in caught.value.what
    assert "truncated" in caught.value.what
    assert str(tmp_path / "a") in caught.value.where
    # an expert that takes no part may be broken
    assert plan_of(tmp_path, {"b": 1.0, "a": 0.0}).experts[0].name == "b"


def test_one_broken_expert_keeps_its_own_kind_of_error(tmp_path: Path) -> None:
    write_expert(tmp_path / "a", use_qalora=True)
    with pytest.raises(UnsupportedAdapterError):
        plan_of(tmp_path)
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(FileFormatError):
        plan_of(tmp_path)


@pytest.mark.parametrize(("method", "message"), [("factor_average", "one rank"), ("factor_linear", "one rank")])
def test_unequal_ranks_are_refused_where_the_method_needs_equal_ones(tmp_path: Path, method: str, message: str) -> None:
    write_expert(tmp_path / "a", rank=2, alpha=4)
    write_expert(tmp_path / "b", rank=4, alpha=8)
    with pytest.raises(IncompatibleExpertsError, match=message) as caught:
        plan_of(tmp_path, method=method)
    assert "a has rank 2, b has rank 4" in caught.value.what
    assert "linear" in caught.value.mend


def test_unequal_scalings_are_refused_by_factor_average_alone(tmp_path: Path) -> None:
    write_expert(tmp_path / "a", alpha=4)
    write_expert(tmp_path / "b", alpha=8)
    with pytest.raises(IncompatibleExpertsError, match="one scaling"):
        plan_of(tmp_path, method="factor_average")
    assert plan_of(tmp_path, method="factor_linear").rank == 4


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": -1.0}, {"a": 1.0, "b": -1.0 + 1e-9}])
def test_weights_that_cancel_are_refused_by_factor_average(tmp_path: Path, weights: dict[str, float]) -> None:
    write_expert(tmp_path / "a", seed=1)
    write_expert(tmp_path / "b", seed=2)
    with pytest.raises(UsageError, match="divides by the sum of the weights"):
        plan_of(tmp_path, weights, method="factor_average")
    assert plan_of(tmp_path, weights).rank == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "linaer"}, "unknown merge method 'linaer'"),
        ({"rank": 0}, "must be at least 1"),
        ({"dtype": "float8"}, "the dtype 'float8' is unknown"),
        ({"dtype": "float32", "into_base": True}, "keeps its base's dtypes"),
        ({"rank": 4, "into_base": True}, "is never truncated"),
        ({"base": "base", "into_base": True}, "this soup is folded into a base model"),
    ],
)
def test_options_out_of_place_are_usage_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_expert(tmp_path / "a")
    with pytest.raises(UsageError, match=message):
        plan_of(tmp_path, **options)


def test_a_strangers_method_comes_in_as_an_argument(tmp_path: Path) -> None:
    write_expert(tmp_path / "a")
    row = Method("mine", "tests.experts:write_expert", "factor", ("folded",), "?", "me", "A test.")
    assert plan_of(tmp_path, method=row, into_base=True).method is row
    with pytest.raises(UsageError, match="cannot be written in the encoding stacked"):
        plan_of(tmp_path, method=row)


def test_targets_are_names_where_a_list_would_match_too_much(tmp_path: Path) -> None:
    some = {"model.layers.1.mlp.up_proj": (96, 64)}
    write_expert(tmp_path / "a", shapes=some, layers_to_transform=[1])
    assert plan_of(tmp_path).layout.target_modules == ("model.layers.1.mlp.up_proj",)
    write_expert(tmp_path / "b", shapes=some, target_modules=r".*1\.mlp\.up_proj")
    assert plan_of(tmp_path, {"b": 1.0}).layout.target_modules == ("model.layers.1.mlp.up_proj",)


def test_two_experts_of_one_side_are_no_opposed_sides(tmp_path: Path) -> None:
    for index, name in enumerate(("friendly-1", "friendly-2")):
        write_expert(tmp_path / name, seed=index)
        write_record(tmp_path / name, side="friendly", dimension="style")
    assert len(plan_of(tmp_path).experts) == 2


def test_folders_without_record_that_bear_sides_names_are_those_sides(tmp_path: Path) -> None:
    for index, name in enumerate(("elementary", "expert", "concise", "mine")):
        write_expert(tmp_path / name, seed=index)
    with pytest.raises(DeclarationError, match="'elementary' and 'expert' are two sides of one dimension, 'expertise'"):
        plan_of(tmp_path)
    write_record(tmp_path / "expert", side="pedantry", dimension="pedantry")
    assert len(plan_of(tmp_path).experts) == 4


def test_a_profiles_rank_is_refused_at_its_line_where_a_model_is_asked_for(tmp_path: Path) -> None:
    write_expert(tmp_path / "a")
    profile = load_text("weights: {a: 1}\nrank: 2\n", Profile, "u.yaml")
    with pytest.raises(UsageError, match="is never truncated") as caught:
        plan_merge(ExpertLibrary.open(tmp_path), profile, into_base=True)
    assert caught.value.where == "u.yaml:2: rank"


def test_a_plan_for_a_model_has_no_rank_for_vllm(tmp_path: Path) -> None:
    write_expert(tmp_path / "a")
    assert "max-lora-rank" not in "\n".join(plan_of(tmp_path, into_base=True).lines())


def test_a_rank_that_vllm_does_not_load_is_refused_for_vllm(tmp_path: Path) -> None:
    write_expert(tmp_path / "a", rank=400)
    write_expert(tmp_path / "b", rank=300)
    assert plan_of(tmp_path).vllm_max_lora_rank is None
    with pytest.raises(UsageError, match="rank 700, but vLLM loads only ranks up to 512"):
        plan_of(tmp_path, target="vllm")
    assert plan_of(tmp_path, target="vllm", rank=64).rank == 64


def test_the_profiles_options_stay_with_another_method_that_takes_them(tmp_path: Path) -> None:
    write_expert(tmp_path / "a")
    profile = Profile(weights={"a": 1.0}, method="ties", options={"density": 0.2, "lambda": 0.9})
    library = ExpertLibrary.open(tmp_path)
    assert plan_merge(library, profile, MergeOptions(rank=2, method="ties@peft")).options == {"density": 0.2}
    assert plan_merge(library, profile, MergeOptions(method="linear")).options == {}
