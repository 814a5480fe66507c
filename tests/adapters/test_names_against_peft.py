"""Folding into bases under other names than the adapter's, held to what PEFT merges into the model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personalized_soups import ExpertLibrary, Profile, merge_into_base
from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.stored_names import SHIFTED_NAMES
from personalized_soups.errors import IncompatibleExpertsError
from tests import oracles

peft = pytest.importorskip("peft")

Q = "layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Case:
    """A base and how it is trained on: `make` builds what save_pretrained writes, `stored` renames what it wrote."""

    make: Callable[[], Any]
    load: str
    targets: str
    stored: Mapping[str, str] | None = None
    adds: tuple[str, ...] = ()


def text(kind: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        **fields,
    }


def llama() -> Any:
    table = text("llama")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**table))


def qwen3_5() -> Any:
    linear = {f"linear_{name}": size for name, size in (("num_key_heads", 2), ("num_value_heads", 2))}
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(
        text_config=text("qwen3_5_text", **linear, **heads),
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": []},
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def llava() -> Any:
    # as many inputs as the language model has, so that a wrong tower would fit
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=text("llama", num_key_value_heads=2),
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **vision},
    )
    return transformers.LlavaForConditionalGeneration(config)


def gpt_neox() -> Any:
    table = text("gpt_neox")
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**table, tie_word_embeddings=False))


CASES = {
    # transformers' PrefixChange, and base_model_prefix
    "language model of a multimodal base": Case(qwen3_5, "AutoModelForCausalLM", r".*(q_proj|down_proj|lm_head)"),
    # the files of Qwen3.5 hold a layer for predicting further tokens, whose names end alike
    "with a second stack of layers": Case(
        qwen3_5,
        "AutoModelForCausalLM",
        r".*(q_proj|down_proj)",
        adds=(f"mtp.{Q}.weight", "mtp.layers.0.mlp.down_proj.weight"),
    ),
    "bare model": Case(llama, "AutoModel", r".*(q_proj|down_proj)"),
    # WeightRenaming of a class
    "renamed output embedding": Case(
        gpt_neox, "AutoModelForCausalLM", r".*(query_key_value|lm_head)", {"lm_head.": "embed_out."}
    ),
    # WeightRenaming of a composite model and of its towers
    "old names of two towers": Case(
        llava,
        "AutoModelForImageTextToText",
        r".*(q_proj|linear_1|fc1|lm_head)",
        {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
    ),
    "files of a compiled model": Case(
        llama, "AutoModelForCausalLM", r".*(q_proj|down_proj)", {"": "_orig_mod."}
    ),
}  # fmt: skip


def renamed(name: str, table: Mapping[str, str]) -> str:
    for start, other in table.items():
        if name.startswith(start):
            return other + name.removeprefix(start)
    return name


def write_base(folder: Path, case: Case) -> Path:
    torch.manual_seed(0)
    case.make().save_pretrained(folder)
    tensors = {renamed(name, case.stored or {}): value for name, value in load_file(folder / WEIGHTS).items()}
    for name in case.adds:
        alike = next(value for other, value in tensors.items() if other.endswith(name.removeprefix("mtp.")))
        tensors[name] = torch.randn_like(alike)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def load(folder: Path, case: Case) -> nn.Module:
    """Load a base as its adapter's training does; every tensor of the model must come from the files."""
    model, info = getattr(transformers, case.load).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert isinstance(model, nn.Module)
    return model


def trained(folder: Path, model: nn.Module, targets: str) -> Mapping[str, Tensor]:
    """Save an adapter of random factors by PEFT, and return the model that PEFT makes of it."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.2)
        wrapped.save_pretrained(folder)
        return {name: value.clone() for name, value in wrapped.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_the_folded_model_is_what_peft_merges_into_the_loaded_base(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base = write_base(tmp_path / "base", case)
    to_load = base
    if name == "files of a compiled model":  # transformers itself does not load those
        to_load = write_base(tmp_path / "plain", Case(case.make, case.load, case.targets))
    model = load(to_load, case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    want = trained(tmp_path / "experts" / "one", model, case.targets)
    out = merge_into_base(
        ExpertLibrary.open(tmp_path / "experts"), Profile(weights={"one": 1.0}), base, tmp_path / "out"
    )
    stored = load_file(out / WEIGHTS)
    assert list(oracles.raw_tensors(out / WEIGHTS)) == list(oracles.raw_tensors(base / WEIGHTS))  # the files' names
    assert sum(not torch.equal(value, load_file(base / WEIGHTS)[name]) for name, value in stored.items()) == sum(
        not torch.equal(value, before[name]) for name, value in want.items()
    )
    if to_load != base:
        save_file(
            {name.removeprefix("_orig_mod."): value for name, value in stored.items()}, out / WEIGHTS, {"format": "pt"}
        )
    got = load(out, case).state_dict()
    assert got.keys() == want.keys()
    for tensor, value in want.items():
        # two products of rank 2, each rounded to float32 a few times, in the norm of what is added up
        room = 16 * 2.0**-24 * float(before[tensor].norm() + (value - before[tensor]).norm())
        assert float((got[tensor].double() - value.double()).norm()) <= room, tensor


@pytest.mark.parametrize("are_old", [False, True])
def test_an_adapter_with_the_names_of_older_files_is_placed_by_them(tmp_path: Path, are_old: bool) -> None:
    """The base's files may have the old or the new names. PEFT 0.21.2 itself loads six of these eight modules."""
    case = CASES["old names of two towers"]
    assert case.stored is not None
    base = write_base(tmp_path / "base", case if are_old else replace(case, stored=None))
    folder = tmp_path / "experts" / "one"
    model = load(base, case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    want = trained(folder, model, case.targets)
    prefix = "base_model.model."
    tensors = {name.removeprefix(prefix): value for name, value in load_file(folder / ADAPTER).items()}
    renames = {f"{prefix}{renamed(name, case.stored)}": value for name, value in tensors.items()}
    assert not any(f"{prefix}{name}" in renames for name in tensors)
    save_file(renames, folder / ADAPTER)
    out = merge_into_base(
        ExpertLibrary.open(tmp_path / "experts"), Profile(weights={"one": 1.0}), base, tmp_path / "out"
    )
    got = load(out, case).state_dict()
    for tensor, value in want.items():
        room = 16 * 2.0**-24 * float(before[tensor].norm() + (value - before[tensor]).norm())
        assert float((got[tensor].double() - value.double()).norm()) <= room, tensor


def compiled(model: Any) -> Any:
    return torch.compile(model)


def compiled_layers(model: Any) -> Any:
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = torch.compile(layer)
    return model


def parallel(model: Any) -> Any:
    return nn.DataParallel(model)


def averaged_and_compiled(model: Any) -> Any:
    from torch.optim.swa_utils import AveragedModel

    return torch.compile(AveragedModel(model))


@pytest.mark.parametrize(
    ("wrap", "left"),
    [
        (compiled, {"_orig_mod"}),
        (compiled_layers, {"_orig_mod"}),
        (parallel, {"module"}),
        (averaged_and_compiled, {"_orig_mod", "module"}),
    ],
)
def test_an_adapter_saved_from_a_wrapped_model_is_what_peft_merges_into_it(
    tmp_path: Path, wrap: Callable[[Any], Any], left: set[str]
) -> None:
    base = write_base(tmp_path / "base", Case(llama, "", ""))
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = trained(tmp_path / "experts" / "one", wrap(model), r".*(q_proj|down_proj)")
    want = {without_wraps(name): value for name, value in wrapped.items()}
    steps = {step for name in oracles.raw_tensors(tmp_path / "experts" / "one" / ADAPTER) for step in name.split(".")}
    assert steps & {"_orig_mod", "module"} == left  # what PEFT itself has left in the names
    out = merge_into_base(
        ExpertLibrary.open(tmp_path / "experts"), Profile(weights={"one": 1.0}), base, tmp_path / "out"
    )
    got = load_file(out / WEIGHTS)
    changed = 0
    for name, value in got.items():
        room = 16 * 2.0**-24 * float(before[name].norm() + (want[name] - before[name]).norm())
        assert float((value.double() - want[name].double()).norm()) <= room, name
        changed += not torch.equal(value, before[name])
    assert changed == 4


def without_wraps(name: str) -> str:
    return ".".join(step for step in name.split(".") if step not in {"_orig_mod", "module"})


def test_parameters_that_transformers_computes_from_several_tensors_are_refused_with_their_names(
    tmp_path: Path,
) -> None:
    moe = {"num_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1, "decoder_sparse_step": 1}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**text("qwen3_moe", **moe)))
    model.save_pretrained(tmp_path / "base")
    parameter = "model.layers.0.mlp.experts.gate_up_proj"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "experts" / "one")
    library = ExpertLibrary.open(tmp_path / "experts")
    with pytest.raises(
        IncompatibleExpertsError, match=rf"{parameter} is not in the base \(transformers computes it from"
    ) as caught:
        merge_into_base(library, Profile(weights={"one": 1.0}), tmp_path / "base", tmp_path / "out")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in caught.value.what


def test_a_tensor_that_transformers_computes_from_a_single_one_is_not_that_one(tmp_path: Path) -> None:
    moe = {"num_experts": 1, "moe_intermediate_size": 8, "num_experts_per_tok": 1, "decoder_sparse_step": 1}
    config = transformers.Qwen3MoeConfig(**text("qwen3_moe", **moe))
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    model = BaseModel.open(tmp_path)
    assert "model.layers.0.mlp.experts.0.down_proj.weight" in model.checkpoint
    assert model.find("model.layers.0.mlp.experts.down_proj") is None


def test_every_model_whose_names_overlap_is_known() -> None:
    """transformers has a renaming of its own for names of which one is a source and another's target."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import GroupWeightRename

    groups = {
        kind: [each for each in get_checkpoint_conversion_mapping(kind) or [] if isinstance(each, GroupWeightRename)]
        for kind in transformers.CONFIG_MAPPING
    }
    assert {kind for kind, own in groups.items() if own} == SHIFTED_NAMES
    block = "vision_tower.encoder.blocks.0.mlp"
    renamed = [[each.rename_source_key(f"{block}.{name}")[0] for name in ("fc0", "fc1")] for each in groups["kimi_k25"]]
    assert [f"{block}.fc1", f"{block}.fc2"] in renamed
