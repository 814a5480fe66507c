from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge, merge_into_base
from personalized_soups.adapters.describe import describe
from personalized_soups.errors import InputError
from tests.experts import SHAPES, write_config, write_expert, write_record


def test_an_expert_a_library_and_their_soups_are_told_apart(tmp_path: Path, small_base: Path) -> None:
    experts = tmp_path / "experts"
    write_expert(experts / "friendly", seed=1, rank=2, alpha=8, base=str(small_base))
    write_record(experts / "friendly", dimension="style", metrics={"accuracy": 0.75})
    write_expert(experts / "concise", seed=2, base=str(small_base))
    library, profile = ExpertLibrary.open(experts), Profile(user="me", weights={"friendly": 0.6, "concise": 0.3})

    expert = describe(experts / "friendly")
    assert expert.kind == "expert"
    assert expert.facts["rank"] == 2
    assert expert.facts["scaling"] == 4
    assert expert.facts["side"] == "friendly"
    assert expert.facts["metrics"] == {"accuracy": 0.75}
    assert expert.facts["layers"] == ["down_proj", "k_proj", "q_proj", "up_proj"]
    assert expert.facts["num_parameters"] == sum(2 * (out + into) for out, into in SHAPES.values())

    soup = describe(merge(library, profile, MergeOptions(rank=3)).write(tmp_path / "soup"))
    assert soup.kind == "merged adapter"
    assert soup.facts["weights"] == {"friendly": 0.6, "concise": 0.3}
    assert soup.facts["rank"] == 3
    assert 0 < soup.facts["truncation_error"] < 1
    assert soup.facts["user"] == "me"

    base = describe(small_base)
    assert base.kind == "model"
    assert base.facts["architecture"] == "LlamaForCausalLM"

    model = describe(merge_into_base(library, profile, small_base, tmp_path / "model"))
    assert model.kind == "merged model"
    assert model.facts["num_parameters"] == base.facts["num_parameters"]

    listed = describe(experts)
    assert listed.kind == "library"
    assert [member["name"] for member in listed.members] == ["concise", "friendly"]
    for description in (expert, soup, base, model, listed):
        assert json.dumps(description.as_json(), allow_nan=False)


def test_a_broken_expert_is_listed_with_its_fault(tmp_path: Path) -> None:
    write_expert(tmp_path / "a")
    write_config(tmp_path / "a", use_dora=True)
    (member,) = describe(tmp_path).members
    assert "use_dora" in member["fault"]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_of_no_kind_is_an_input_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        describe(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


def test_a_name_too_long_for_the_file_system_is_no_folder() -> None:
    with pytest.raises(InputError, match="the folder does not exist"):
        describe("x" * 5000)
