"""Merges against PEFT's add_weighted_adapter where it is right, and round trips through PEFT and transformers.

PEFT 0.21.2 is right for plain LoRA; it is wrong for rsLoRA, DoRA and lora_bias, which are left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge, merge_into_base
from tests import oracles
from tests.experts import write_expert

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT still asks transformers by the old name; nothing of ours to change
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

NAMES = ("one", "two", "three")
TOKENS = torch.tensor([[7, 11, 13, 17, 19, 23]])


def write_experts(root: Path, base: Path, **options: Any) -> ExpertLibrary:
    for index, name in enumerate(NAMES):
        chosen = {key: value[index] if isinstance(value, tuple) else value for key, value in options.items()}
        write_expert(root / name, seed=index, base=str(base), **chosen)
    return ExpertLibrary.open(root)


def loaded(base: Path, adapter: Path, name: str = "default") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter, adapter_name=name).eval()


def peft_deltas(library: ExpertLibrary, base: Path, weights: Sequence[float], **options: Any) -> dict[str, Tensor]:
    """Return the dense deltas of the adapter that add_weighted_adapter merges from the experts."""
    names = list(library) if len(weights) == len(library) else list(NAMES[: len(weights)])
    model = loaded(base, library[names[0]].folder, names[0])
    for name in names[1:]:
        model.load_adapter(library[name].folder, adapter_name=name)
    model.add_weighted_adapter(names, list(weights), adapter_name="soup", **options)
    return deltas_of(model, "soup")


def deltas_of(model: Any, adapter: str) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A
    }


def check_equal(folder: Path, theirs: dict[str, Tensor], tolerance: float) -> None:
    ours = oracles.deltas(folder)
    assert ours.keys() == theirs.keys()
    for module, delta in theirs.items():
        assert oracles.relative_error(delta.detach().double().numpy(), ours[module]) < tolerance, module


@pytest.mark.parametrize(
    ("rank", "alpha", "weights"),
    [(4, 8, (0.6, 0.6, 0.6)), ((2, 4, 3), (8, 4, 1), (0.7, -0.4, 1.3)), (4, (1, 16, 3), (-1.0, 2.0, 0.25))],
)
def test_linear_is_pefts_cat(tmp_path: Path, small_base: Path, rank: Any, alpha: Any, weights: Sequence[float]) -> None:
    library = write_experts(tmp_path / "experts", small_base, rank=rank, alpha=alpha)
    theirs = peft_deltas(library, small_base, [weights[NAMES.index(name)] for name in library], combination_type="cat")
    ours = merge(library, Profile(weights=dict(zip(NAMES, weights, strict=True)))).write(tmp_path / "out")
    check_equal(ours, theirs, 1e-6)


@pytest.mark.parametrize("rank", [2, 5])
def test_truncated_linear_is_pefts_svd(tmp_path: Path, small_base: Path, rank: int) -> None:
    library = write_experts(tmp_path / "experts", small_base, alpha=(8, 4, 6))
    weights = dict(zip(NAMES, (0.7, -0.4, 1.3), strict=True))
    theirs = peft_deltas(
        library, small_base, [weights[name] for name in library], combination_type="svd", svd_rank=rank
    )
    ours = merge(library, Profile(weights=weights), MergeOptions(rank=rank)).write(tmp_path / "out")
    # PEFT decomposes dense float32 matrices
    check_equal(ours, theirs, 1e-5)


@pytest.mark.parametrize("weights", [(0.6, 0.6, 0.6), (0.7, -0.4, 1.3)])
def test_factor_linear_is_pefts_linear(tmp_path: Path, small_base: Path, weights: Sequence[float]) -> None:
    library = write_experts(tmp_path / "experts", small_base, alpha=(8, 4, 6))
    named = dict(zip(NAMES, weights, strict=True))
    theirs = peft_deltas(library, small_base, [named[name] for name in library], combination_type="linear")
    ours = merge(library, Profile(weights=named, method="factor_linear")).write(tmp_path / "out")
    check_equal(ours, theirs, 1e-6)


@pytest.mark.parametrize("options", [{}, {"rank": 5}, {"method": "factor_average"}])
def test_peft_loads_what_was_written_and_sees_the_same_deltas(
    tmp_path: Path, small_base: Path, options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    library = write_experts(tmp_path / "experts", small_base)
    folder = merge(library, Profile(weights=dict.fromkeys(NAMES, 0.6)), MergeOptions(**options)).write(tmp_path / "out")
    model = loaded(small_base, folder)
    check_equal(folder, deltas_of(model, "default"), 1e-6)
    assert not [warning for warning in recwarn if "missing" in str(warning.message).lower()]


def test_pefts_own_saved_adapters_are_read_right(tmp_path: Path, small_base: Path) -> None:
    """Folders that PEFT wrote: rsLoRA, patterns, and a regular expression as target."""
    settings: dict[str, dict[str, Any]] = {
        "rs": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
        "patterns": {
            "r": 4,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"up_proj": 32},
            "target_modules": ["q_proj", "up_proj"],
        },
        "regex": {"r": 3, "target_modules": r".*layers\.1.*(up|down)_proj"},
        "gaussian": {"r": 2, "init_lora_weights": "gaussian", "target_modules": ["o_proj"], "layers_to_transform": [0]},
    }
    dense = {}
    for index, (name, options) in enumerate(settings.items()):
        base = transformers.AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(index)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        model.save_pretrained(tmp_path / "experts" / name)
        dense[name] = deltas_of(model, "default")
    library = ExpertLibrary.open(tmp_path / "experts")
    weights = {"rs": 0.5, "patterns": -0.7, "regex": 1.1, "gaussian": 0.9}
    folder = merge(library, Profile(weights=weights)).write(tmp_path / "out")
    want: dict[str, Tensor] = {}
    for name, deltas in dense.items():
        for module, delta in deltas.items():
            want[module] = want.get(module, torch.zeros_like(delta)) + weights[name] * delta
    check_equal(folder, want, 1e-6)
    # and back: PEFT must adapt exactly these modules, no more
    assert deltas_of(loaded(small_base, folder), "default").keys() == want.keys()


def test_adapter_and_folded_model_answer_alike(tmp_path: Path, small_base: Path) -> None:
    """The soup as an adapter in PEFT, folded by us, and folded by PEFT: all compute the same outputs."""
    library = write_experts(tmp_path / "experts", small_base)
    profile = Profile(weights=dict(zip(NAMES, (0.7, -0.4, 1.3), strict=True)))
    adapter = merge(library, profile).write(tmp_path / "adapter")
    model_folder = merge_into_base(library, profile, small_base, tmp_path / "model")
    with torch.no_grad():
        with_adapter = loaded(small_base, adapter)
        one = with_adapter(TOKENS).logits
        two = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)(TOKENS).logits
        three = with_adapter.merge_and_unload()(TOKENS).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)(TOKENS).logits
    assert (one - plain).abs().max() > 0.05  # the soup does something
    torch.testing.assert_close(two, one, rtol=0, atol=2e-6 * float(one.abs().max()) + 2e-6)
    torch.testing.assert_close(two, three, rtol=0, atol=2e-6 * float(one.abs().max()) + 2e-6)


def test_transformers_loads_the_adapter_by_itself(tmp_path: Path, small_base: Path) -> None:
    library = write_experts(tmp_path / "experts", small_base)
    adapter = merge(library, Profile(weights=dict.fromkeys(NAMES, 0.5))).write(tmp_path / "adapter")
    with torch.no_grad():
        direct = transformers.AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)(TOKENS).logits
        through_peft = loaded(small_base, adapter)(TOKENS).logits
    torch.testing.assert_close(direct, through_peft, rtol=0, atol=1e-6)
