"""PeftView computes what PEFT computes with the same adapters loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from personalized_soups import SoupModel
from personalized_soups.errors import DeclarationError, UsageError
from personalized_soups.mixing.peft_view import PeftView
from tests.mixing.worlds import LOGITS, open_model, random_ids, relative, write_experts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def models(tmp_path: Path, small_base: Path) -> tuple[Any, Any, SoupModel]:
    """PEFT's own model with three adapters, the view, and the model behind it."""
    from transformers import AutoModelForCausalLM

    folders = write_experts(tmp_path / "experts")
    base = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()
    theirs = PeftModel.from_pretrained(base, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        theirs.load_adapter(folder, adapter_name=folder.name)
    soup = open_model(small_base, tmp_path / "experts")
    return theirs.eval(), PeftView(soup), soup


def test_existing_code_keeps_working(models: tuple[Any, Any, SoupModel]) -> None:
    theirs, view, soup = models
    ids = random_ids(3, 6)
    assert PeftModel in type(view).__mro__
    assert set(view.peft_config) == set(theirs.peft_config)
    assert isinstance(view.peft_config["warm"], LoraConfig)
    assert view.get_base_model() is soup.model is view.base_model.model
    assert view.config is soup.model.config
    assert view.device == theirs.device
    assert view.get_nb_trainable_parameters()[0] == 0
    view.eval()
    for names in ("warm", "cold"):
        theirs.set_adapter(names)
        view.set_adapter(names)
        assert view.active_adapter == theirs.active_adapter == names
        assert view.active_adapters == theirs.active_adapters
        with torch.no_grad():
            assert relative(view(input_ids=ids).logits, theirs(input_ids=ids).logits) < LOGITS
            with view.disable_adapter(), theirs.disable_adapter():
                assert relative(view(input_ids=ids).logits, theirs(input_ids=ids).logits) < LOGITS
    theirs.base_model.set_adapter(["warm", "cold"])
    view.set_adapter(["warm", "cold"])
    with torch.no_grad():
        assert relative(view(ids).logits, theirs(ids).logits) < LOGITS


def test_mixed_batches_by_adapter_names(models: tuple[Any, Any, SoupModel]) -> None:
    theirs, view, _ = models
    ids, names = random_ids(3, 6), ["warm", "__base__", "cold"]
    with torch.no_grad():
        got, want = (model(input_ids=ids, adapter_names=names).logits for model in (view, theirs))
        assert relative(got, want) < LOGITS
        options = {"input_ids": ids, "adapter_names": names, "max_new_tokens": 5, "pad_token_id": 2}
        assert torch.equal(view.generate(**options), theirs.generate(**options))
        beams = {**options, "num_beams": 2}
        assert torch.equal(view.generate(**beams), theirs.generate(**beams))
    with pytest.raises(UsageError, match="the number of profiles is 2, but the number of prompts is 3"):
        view.generate(input_ids=ids, adapter_names=names[:2])


def test_weighted_adapters_are_profiles(models: tuple[Any, Any, SoupModel]) -> None:
    theirs, view, soup = models
    ids = random_ids(2, 6)
    # PEFT's cat is wrong for the rsLoRA among them (it scales again by sqrt of the new rank): plain ones alone
    weighted = {"adapters": ["cold", "plain"], "weights": [0.7, -0.4], "adapter_name": "both"}
    theirs.add_weighted_adapter(**weighted, combination_type="cat")
    view.add_weighted_adapter(**weighted, combination_type="cat")
    theirs.set_adapter("both")
    view.set_adapter("both")
    assert view.active_adapter == "both"
    with torch.no_grad():
        assert relative(view(ids).logits, theirs(ids).logits) < LOGITS
        mixed = view(ids, adapter_names=["both", "__base__"]).logits
        assert relative(mixed[0], theirs(ids).logits[0]) < LOGITS
    view.delete_adapter("both")
    assert "both" not in soup.profiles
    with torch.no_grad(), view.disable_adapter():
        bare = view(ids).logits
    with torch.no_grad():
        assert torch.equal(view(ids).logits, bare)
    for wrong in (
        {**weighted, "combination_type": "svd"},
        {**weighted, "weights": [0.7]},
        {**weighted, "adapter_name": "warm"},
    ):
        with pytest.raises(UsageError):
            view.add_weighted_adapter(**wrong)


def test_adapters_come_and_go(models: tuple[Any, Any, SoupModel], tmp_path: Path) -> None:
    _, view, soup = models
    view.load_adapter(str(tmp_path / "experts" / "warm"), adapter_name="again")
    assert "again" in view.peft_config
    view.set_adapter("again")
    view.delete_adapter("again")
    assert "again" not in soup.experts
    assert view.active_adapters == []
    with pytest.raises(UsageError, match="no expert is called 'agian'"):
        view.set_adapter("agian")
    for call in (view.add_adapter, view.save_pretrained, view.merge_and_unload):
        with pytest.raises(UsageError, match="a PeftView does not support") as caught:
            call("x")
        assert caught.value.mend
    with pytest.raises(DeclarationError):
        view.add_weighted_adapter(["nobody"], [1.0], "x")
