"""A SoupModel on top of an SFT adapter: each row is base + adapter + soup, the adapter exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from personalized_soups import Generator, PrefixCache, SoupModel
from personalized_soups.errors import IncompatibleExpertsError
from personalized_soups.mixing.peft_view import PeftView
from tests.base_adapters import trained_on, write_sft
from tests.experts import write_expert
from tests.mixing.worlds import LOGITS, float64_model, random_ids, relative, write_experts

ROWS: list[dict[str, float] | None] = [{"cold": 0.6, "warm": 0.5}, None, {"plain": 1.3}, {"cold": -0.7, "plain": 0.4}]


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    return write_sft(tmp_path / "sft")


@pytest.fixture
def experts(tmp_path: Path, sft: Path) -> list[Path]:
    return [trained_on(folder, sft) for folder in write_experts(tmp_path / "experts")]


def open_on(base: Path, experts: list[Path], sft: Path | None) -> SoupModel:
    return SoupModel.from_pretrained(base, experts[0].parent, on=sft, device="cpu")


def true_logits(base: Path, sft: Path, experts: list[Path], weights: dict[str, float] | None, ids_T: Tensor) -> Tensor:
    own = [(weights or {}).get(folder.name, 0.0) for folder in experts]
    with torch.no_grad():
        logits: Tensor = float64_model(base, [sft, *experts], [1.0, *own])(input_ids=ids_T[None]).logits[0]
    return logits


def test_each_row_has_the_adapter_once(small_base: Path, sft: Path, experts: list[Path]) -> None:
    model = open_on(small_base, experts, sft)
    ids_BT = random_ids(len(ROWS), 9)
    with model.mixture(ROWS), torch.no_grad():
        got = model(input_ids=ids_BT).logits
    for row, weights in enumerate(ROWS):
        assert relative(got[row], true_logits(small_base, sft, experts, weights, ids_BT[row])) < LOGITS, weights


def test_outside_of_a_mixture_and_after_unload_the_model_is_base_and_adapter(
    small_base: Path, sft: Path, experts: list[Path]
) -> None:
    model = open_on(small_base, experts, sft)
    ids_BT = random_ids(2, 9)
    with torch.no_grad():
        want = Generator.open(small_base, on=sft, device="cpu").model(input_ids=ids_BT).logits
        assert torch.equal(model(input_ids=ids_BT).logits, want)
        assert torch.equal(PeftView(model)(input_ids=ids_BT).logits, want)
        assert torch.equal(model.unload()(input_ids=ids_BT).logits, want)


def test_answers_with_cached_prefixes_are_those_without(small_base: Path, sft: Path, experts: list[Path]) -> None:
    model = open_on(small_base, experts, sft)
    bare = SoupModel.from_pretrained(small_base, write_experts(experts[0].parent.parent / "bare"), device="cpu")
    cache, prompts = PrefixCache(), ["wash the old kettle", "wash the old kettle with warm water"]
    for weights in ROWS:
        for prompt in prompts:
            cached = "".join(model.stream(prompt, weights, max_new_tokens=6, prefixes=cache))
            assert cached == model.generate([prompt], [weights], max_new_tokens=6)[0]
        # a cache that both models share never mixes them up, although their experts are equal
        assert (
            "".join(bare.stream(prompts[1], weights, max_new_tokens=6, prefixes=cache))
            == bare.generate([prompts[1]], [weights], max_new_tokens=6)[0]
        )


def test_experts_can_be_added_and_replaced(small_base: Path, sft: Path, experts: list[Path], tmp_path: Path) -> None:
    model = open_on(small_base, experts, sft)
    late = trained_on(write_expert(tmp_path / "late", seed=9), sft)
    model.experts.add(late)
    ids_BT = random_ids(1, 9)
    with model.mixture([{"late": 0.8}]), torch.no_grad():
        got = model(input_ids=ids_BT).logits[0]
    assert relative(got, true_logits(small_base, sft, [late], {"late": 0.8}, ids_BT[0])) < LOGITS
    other = write_sft(tmp_path / "other", seed=5)
    for folder in (
        trained_on(write_expert(tmp_path / "stray"), other),
        trained_on(write_expert(tmp_path / "bare"), None),
    ):
        with pytest.raises(IncompatibleExpertsError, match="not trained on top of the adapter that is given"):
            model.experts.add(folder)
    assert sorted(model.experts) == ["cold", "late", "plain", "warm"]


def test_experts_of_an_adapter_need_it(small_base: Path, sft: Path, experts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(IncompatibleExpertsError, match=r"no adapter is given: cold: on top of sft \(") as caught:
        open_on(small_base, experts, None)
    assert "cold, plain, warm" in caught.value.where
    assert caught.value.mend == "give the folder of this adapter: on=sft"
    with pytest.raises(IncompatibleExpertsError, match=r"not trained on top of the adapter that is given \(other"):
        open_on(small_base, experts, write_sft(tmp_path / "other", seed=5))
    trained_on(experts[1], None)
    with pytest.raises(IncompatibleExpertsError, match=r"not trained on top .* plain: without an adapter"):
        open_on(small_base, experts, sft)
    # an expert of another program has no record, so nobody knows on top of which adapter it was trained
    (experts[1] / "expert.json").unlink()
    assert len(open_on(small_base, experts, sft).experts) == 3


def test_a_model_that_includes_the_adapter_already_is_not_changed(
    small_base: Path, sft: Path, experts: list[Path]
) -> None:
    model = Generator.open(small_base, on=sft, device="cpu").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    soup = SoupModel(model, experts[0].parent, on=sft)
    assert list(soup.experts) == ["cold", "plain", "warm"]
    for name, tensor in soup.unload().state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(IncompatibleExpertsError, match="no adapter is given"):
        SoupModel(model, experts[0].parent)
