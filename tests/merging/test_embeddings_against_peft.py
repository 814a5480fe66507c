"""Input and output embeddings, tied or not, resized or not: what PEFT and transformers compute from the same files.

V tokens, D features, I in features.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge, merge_into_base
from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.errors import UnsupportedAdapterError
from tests.adapters.test_against_peft import ATTENTION

pytest.importorskip("peft")

V, D = ATTENTION["vocab_size"], 16
Config = dict[str, Any]

FALSE = {"tie_word_embeddings": False}
TRUE = {"tie_word_embeddings": True}

# Whether the files have an output embedding, and what config.json says of it.
BASES: dict[str, tuple[str, Config]] = {
    "own head, false": ("own", FALSE),
    "own head, false, vision true": ("own", {**FALSE, "vision_config": TRUE}),
    "own head, true": ("own", TRUE),
    "own head, nothing said": ("own", {}),
    "equal head, vision true": ("equal", {"vision_config": TRUE}),
    "equal head, true": ("equal", TRUE),
    "no head, true": ("none", TRUE),
    "no head, true, vision false": ("none", {**TRUE, "vision_config": FALSE}),
}
Q = {"target_modules": ["q_proj"]}
KINDS: dict[str, Config] = {
    "tokens": {**Q, "trainable_token_indices": [7, 3]},
    "tokens of the head": {**Q, "trainable_token_indices": {"lm_head": [3, 7]}},
    "tokens of both": {**Q, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
    "other tokens of both": {**Q, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [4]}},
    "embedding and head adapted alike": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "both saved": {**Q, "modules_to_save": ["embed_tokens", "lm_head"]},
}  # fmt: skip

# The embeddings that PEFT saves: resized ones, and those that `save_embedding_layers` asks for.
SAVED: dict[str, Config] = {
    "nothing": Q,
    "both saved": {**Q, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding saved": {**Q, "modules_to_save": ["embed_tokens"]},
    "saved alike": {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both saved, biases": {**Q, "bias": "all", "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {**Q, "trainable_token_indices": [3, V]},
    "other tokens of both": {**Q, "trainable_token_indices": {"embed_tokens": [3, V], "lm_head": [4]}},
    "embedding adapted, head saved": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "embedding and head adapted alike": KINDS["embedding and head adapted alike"],
}


def quietly(act: Callable[[], Any]) -> Any:
    """Return the result of PEFT or transformers, without their warnings about tied weights and saved embeddings."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return act()
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def loaded(folder: Path, adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = quietly(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return model if adapter is None else quietly(lambda: PeftModel.from_pretrained(model, adapter))


def effects(model: Any) -> dict[str, Tensor]:
    """Return what the layers compute, as matrices, through PEFT's wrappers and without merging."""
    layer = getattr(model, "base_model", model)
    layer = getattr(layer, "model", layer) if hasattr(model, "peft_config") else model
    with torch.no_grad():
        return {
            "input": layer.get_input_embeddings()(torch.arange(layer.config.vocab_size)),
            "output": layer.get_output_embeddings()(torch.eye(D)).T,
            "q_proj": layer.model.layers[0].self_attn.q_proj(torch.eye(D)).T,
        }


def check(got: Mapping[str, Tensor], want: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Check the norm of `got - want`: at most 32 float32 roundings of the summands, which are fewer than 32."""
    for name, matrix in want.items():
        room = matrix.double().abs() + base[name].double().abs()
        error = torch.linalg.norm(got[name].double() - matrix.double())
        assert error <= 32 * 2.0**-24 * torch.linalg.norm(room), (name, float(error))


def llama(vocab_size: int, *, tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**ATTENTION, "vocab_size": vocab_size}
    config = LlamaConfig(hidden_size=D, intermediate_size=24, tie_word_embeddings=tied, attention_bias=True, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def write_base(folder: Path, head: str, said: Config) -> Path:
    from safetensors.torch import load_file, save_file

    model: Any = llama(V, tied=False)
    if head != "own":
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    quietly(lambda: model.save_pretrained(folder))
    if head == "none":
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    return folder


def write_expert(folder: Path, base: Path, config: Config, *, resized_from: Path | None = None, **options: Any) -> Path:
    """Save an expert with PEFT, with noise added to the trainable tensors in place of training."""
    from peft import LoraConfig, get_peft_model

    model = loaded(base)
    if resized_from is not None:
        model.name_or_path = model.config._name_or_path = str(resized_from)

    def make() -> None:
        wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **config))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        wrapped.save_pretrained(str(folder), **options)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(folder.name.encode()))
        quietly(make)
    return folder


def check_both_ways(base: Path, expert: Path, out: Path) -> None:
    library, profile = ExpertLibrary.open(expert), Profile(weights={expert.name: 1.0})
    want, before = effects(loaded(base, expert)), effects(loaded(base))
    assert not torch.equal(want["q_proj"], before["q_proj"])
    folded = merge_into_base(library, profile, base, out / "folded")
    check(effects(loaded(folded)), want, before)
    merged = merge(library, profile, MergeOptions(base=base)).write(out / "merged")
    check(effects(loaded(base, merged)), want, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_embeddings_are_tied_where_they_are_for_peft(tmp_path: Path, name: str, kind: str) -> None:
    base = write_base(tmp_path / "base", *BASES[name])
    check_both_ways(base, write_expert(tmp_path / "expert", base, KINDS[kind]), tmp_path)


def write_resized(folder: Path, *, tied: bool) -> tuple[Path, Path]:
    """Write a base, and the same base with two more tokens, with save_pretrained; return both folders."""
    model: Any = llama(V, tied=tied)
    quietly(lambda: model.save_pretrained(folder / "small"))
    quietly(lambda: model.resize_token_embeddings(V + 2))
    quietly(lambda: model.save_pretrained(folder / "base"))
    return folder / "small", folder / "base"


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_were_resized_are_read_as_by_peft(tmp_path: Path, tied: bool, kind: str) -> None:
    small, base = write_resized(tmp_path, tied=tied)
    expert = write_expert(tmp_path / "expert", base, SAVED[kind], resized_from=small)
    check_both_ways(base, expert, tmp_path)


def test_embeddings_that_peft_is_told_to_save_are_read(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", *BASES["no head, true"])
    expert = write_expert(tmp_path / "expert", base, SAVED["saved alike"], save_embedding_layers=True)
    check_both_ways(base, expert, tmp_path)


def test_copies_are_no_trained_tensors_whatever_they_hold(tmp_path: Path) -> None:
    """PEFT accepts a tensor name without the wrapper; other tools write such names."""
    from safetensors.torch import load_file, save_file

    small, base = write_resized(tmp_path, tied=False)
    expert = write_expert(tmp_path / "expert", base, SAVED["both saved"], resized_from=small)
    tensors = load_file(expert / "adapter_model.safetensors")
    copies = [name for name in tensors if "modules_to_save" in name or "original_module" in name]
    assert len(copies) == 4
    assert not set(copies) & set(LoraAdapter.open(expert).trained)
    for name in copies:
        tensors[name] += 1
    save_file(tensors, expert / "adapter_model.safetensors")
    check_both_ways(base, expert, tmp_path)


def test_a_copy_without_the_trained_tensor_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    small, base = write_resized(tmp_path, tied=False)
    expert = write_expert(tmp_path / "expert", base, SAVED["both saved"], resized_from=small)
    tensors = load_file(expert / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, expert / "adapter_model.safetensors")
    with pytest.raises(UnsupportedAdapterError, match=r"lm_head\.(modules_to_save|original_module)\.weight"):
        LoraAdapter.open(expert)


def test_tokens_are_laid_over_a_saved_embedding_that_is_not_the_bases(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    small, base = write_resized(tmp_path, tied=False)
    expert = write_expert(tmp_path / "expert", base, SAVED["tokens"], resized_from=small)
    tensors = load_file(expert / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.token_adapter.base_layer.weight"] += 1
    save_file(tensors, expert / "adapter_model.safetensors")
    library, profile = ExpertLibrary.open(expert), Profile(weights={"expert": 1.0})
    want, before = effects(loaded(base, expert)), effects(loaded(base))
    check(effects(loaded(merge_into_base(library, profile, base, tmp_path / "out"))), want, before)
    with pytest.raises(UnsupportedAdapterError, match="but rows of the same embedding are also trained"):
        merge(library, profile, MergeOptions(base=base)).write(tmp_path / "merged")


def test_experts_whose_tokens_one_adapter_would_read_otherwise_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", *BASES["no head, true"])
    for name in ("tokens", "tokens of the head"):
        write_expert(tmp_path / "experts" / name.split()[-1], base, KINDS[name])
    library, profile = ExpertLibrary.open(tmp_path / "experts"), Profile(weights={"tokens": 0.5, "head": 0.25})
    with pytest.raises(UnsupportedAdapterError, match="the experts together train different tokens") as caught:
        merge(library, profile, MergeOptions(base=base)).write(tmp_path / "out")
    assert "into_base=BASE" in caught.value.mend
    folded = effects(loaded(merge_into_base(library, profile, base, tmp_path / "folded")))
    before = effects(loaded(base))
    shares = {"tokens": 0.5, "head": 0.25}
    own = {name: effects(loaded(base, tmp_path / "experts" / name)) for name in shares}
    want = {
        place: matrix + sum(share * (own[name][place] - matrix) for name, share in shares.items())
        for place, matrix in before.items()
    }
    check(folded, want, before)


def test_a_head_of_which_transformers_makes_both_embeddings_is_not_changed_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = write_base(tmp_path / "base", "equal", TRUE)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    expert = write_expert(tmp_path / "expert", base, {"target_modules": ["q_proj", "lm_head"]})
    library, profile = ExpertLibrary.open(expert), Profile(weights={"expert": 1.0})
    with pytest.raises(UnsupportedAdapterError, match="is also the base's input embedding") as caught:
        merge_into_base(library, profile, base, tmp_path / "out")
    assert "save_pretrained" in caught.value.mend
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [V, V + 1])
def test_a_head_of_another_shape_is_never_the_embedding(tmp_path: Path, rows: int) -> None:
    from safetensors.torch import load_file, save_file

    base = write_base(tmp_path / "base", *BASES["equal head, true"])
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(rows, D)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    want = ("model.embed_tokens.weight", "lm_head.weight") if rows == V else None
    assert BaseModel.open(base).tied == want


@pytest.mark.parametrize("change", ["one less", "one more"])
def test_a_base_is_folded_whose_index_differs_from_its_shards(tmp_path: Path, change: str) -> None:
    base = tmp_path / "base"
    model: Any = llama(V, tied=True)
    quietly(lambda: model.save_pretrained(base, max_shard_size="6KB"))
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change == "one less":
        del index["weight_map"]["model.embed_tokens.weight"]
    else:
        index["weight_map"]["model.layers.9.gone"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    # the output embedding gets a tensor of its own, so a new index is written
    expert = write_expert(tmp_path / "expert", base, KINDS["tokens of the head"])
    library, profile = ExpertLibrary.open(expert), Profile(weights={"expert": 1.0})
    with pytest.warns(RuntimeWarning, match="The tensors in the shards are read"):
        folded = merge_into_base(library, profile, base, tmp_path / "out")
    check(effects(loaded(folded)), effects(loaded(base, expert)), effects(loaded(base)))
