from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge_into_base
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import read_soup_record
from personalized_soups.errors import (
    FileFormatError,
    IncompatibleExpertsError,
    InputError,
    OutputExistsError,
    SoupError,
    UnsupportedAdapterError,
    UsageError,
)
from personalized_soups.merging.computing import blocks
from personalized_soups.merging.computing.blocks import FoldedBlock, queued_blocks
from personalized_soups.merging.writing import model_shards
from personalized_soups.merging.writing.into_base import MergedModel
from tests import oracles
from tests.experts import SHAPES, write_expert, write_record
from tests.merging.computing.queues import EagerQueue, LazyQueue

NAMES = ("one", "two", "three")
WEIGHTS = (0.7, -0.4, 1.3)
PROFILE = Profile(weights=dict(zip(NAMES, WEIGHTS, strict=True)))


def write_base(folder: Path, dtype: str = "F32", *, shards: int = 2, config: dict[str, Any] | None = None) -> Path:
    """Write a model folder of two layers that the experts of tests.experts fit, with every other kind of file."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(5)
    tensors: dict[str, tuple[str, Any]] = {"model.embed_tokens.weight": (dtype, random.normal(size=(50, 64)))}
    for module, shape in SHAPES.items():
        tensors[f"{module}.weight"] = (dtype, random.normal(size=shape) / 8)
        tensors[f"{module}.bias"] = ("F32", random.normal(size=shape[:1]))
    names = list(tensors)
    if shards == 1:
        oracles.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    else:
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in reversed(names[index::shards])}
            oracles.write_tensors(folder / file, part, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    (folder / "tokenizer.json").write_text('{"tokens": "é"}', encoding="utf-8")
    (folder / "generation_config.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    (folder / "pytorch_model.bin").write_bytes(b"stale weights")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    return folder


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    for index, (name, rank) in enumerate(zip(NAMES, (2, 4, 3), strict=True)):
        write_expert(tmp_path / "experts" / name, seed=index, rank=rank)
    return ExpertLibrary.open(tmp_path / "experts")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_every_element_is_within_the_derived_bound(tmp_path: Path, library: ExpertLibrary, dtype: str) -> None:
    """|err| <= ulp/2 + (K + 2) 2^-24 (|W| + sum |w s| |B| |A|), element by element."""
    base = write_base(tmp_path / "base", dtype)
    out = merge_into_base(library, PROFILE, base, tmp_path / "out")
    folders = [library[name].folder for name in NAMES]
    soup, room = oracles.soup(folders, WEIGHTS), oracles.magnitudes(folders, WEIGHTS)
    seen = set()
    for shard in base.glob("*.safetensors"):
        before, after = oracles.read_tensors(shard), oracles.read_tensors(out / shard.name)
        for name, w in before.items():
            if (module := name.removesuffix(".weight")) in soup:
                seen.add(module)
                want = w + soup[module]
                # half an ulp of a value is at most HALF_ULP of its magnitude; the rounding is of what was accumulated
                accumulated = (9 + 2) * 2.0**-24 * (np.abs(w) + room[module])
                ulp = oracles.HALF_ULP[dtype] if dtype != "F32" else 0.0
                bound = accumulated + ulp * (np.abs(want) + accumulated) + oracles.SMALLEST[dtype]
                assert (np.abs(after[name] - want) <= bound).all(), name
                assert (np.abs(after[name] - w) > bound).any(), name  # the bound would see an unmerged tensor
    assert seen == SHAPES.keys()


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_all_else_is_copied_byte_for_byte_in_its_own_order_and_shard(
    tmp_path: Path, library: ExpertLibrary, shards: int
) -> None:
    base = write_base(tmp_path / "base", "BF16", shards=shards)
    out = merge_into_base(library, PROFILE, base, tmp_path / "out")
    for shard in base.glob("*.safetensors"):
        before, after = oracles.raw_tensors(shard), oracles.raw_tensors(out / shard.name)
        assert list(before) == list(after)
        for name, (dtype, shape, raw) in before.items():
            assert after[name][:2] == (dtype, shape)
            assert (after[name][2] == raw) == (name.removesuffix(".weight") not in SHAPES)
        assert oracles.split_file(out / shard.name)[0]["__metadata__"] == {"format": "pt"}
    others = {"config.json", "tokenizer.json", "generation_config.json", "extra/notes.txt"}
    if shards > 1:
        others.add("model.safetensors.index.json")
    for name in others:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == others | {path.name for path in base.glob("*.safetensors")} | {"soup.json"}


def test_the_shard_layout_changes_no_tensor(tmp_path: Path, library: ExpertLibrary) -> None:
    found = []
    for shards in (1, 3):
        base = write_base(tmp_path / f"base{shards}", shards=shards)
        out = merge_into_base(library, PROFILE, base, tmp_path / f"out{shards}")
        found.append({n: raw for path in out.glob("*.safetensors") for n, raw in oracles.raw_tensors(path).items()})
    assert found[0] == found[1]


def test_the_record_names_the_base_and_every_input(tmp_path: Path, library: ExpertLibrary) -> None:
    from blake3 import blake3

    base = write_base(tmp_path / "base")
    out = merge_into_base(library, PROFILE, base, tmp_path / "out")
    record = read_soup_record(out)
    assert record is not None
    assert record.kind == "model"
    assert record.encoding == "folded"
    assert record.rank is None
    assert record.base.fingerprint == base_fingerprint(base)
    assert record.base_blake3 == {
        path.name: blake3(path.read_bytes()).hexdigest() for path in base.glob("*.safetensors")
    }
    assert set(record.files) == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_links_of_a_hub_cache_are_followed(tmp_path: Path, library: ExpertLibrary) -> None:
    blobs = write_base(tmp_path / "blobs", shards=1)
    cached = tmp_path / "cached"
    cached.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (cached / name).symlink_to(blobs / name)
    out = merge_into_base(library, PROFILE, cached, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (blobs / "tokenizer.json").read_bytes()
    assert (blobs / "model.safetensors").read_bytes() != (out / "model.safetensors").read_bytes()


def test_weights_of_methods_on_factors_are_folded_too(tmp_path: Path, library: ExpertLibrary) -> None:
    for name in NAMES:
        shutil.rmtree(library[name].folder)
        write_expert(tmp_path / "experts" / name, seed=len(name), rank=4)
    again = ExpertLibrary.open(tmp_path / "experts")
    base = write_base(tmp_path / "base", shards=1)
    out = merge_into_base(again, PROFILE, base, tmp_path / "out", MergeOptions(method="factor_average"))
    read = [oracles.factors(oracles.read_tensors(again[name].folder / "adapter_model.safetensors")) for name in NAMES]
    after, before = oracles.read_tensors(out / "model.safetensors"), oracles.read_tensors(base / "model.safetensors")
    for module in SHAPES:
        a = np.tensordot(WEIGHTS, [each[module][0] for each in read], 1)
        b = np.tensordot(WEIGHTS, [each[module][1] for each in read], 1)
        want = before[f"{module}.weight"] + 2 / sum(WEIGHTS) * (b @ a)
        assert oracles.relative_error(after[f"{module}.weight"], want) < 1e-6


def test_progress_ends_at_all_tensor_bytes(tmp_path: Path, library: ExpertLibrary) -> None:
    calls: list[tuple[int, int]] = []
    base = write_base(tmp_path / "base")
    merge_into_base(library, PROFILE, base, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    total = sum(len(raw) for path in base.glob("*.safetensors") for _, _, raw in oracles.raw_tensors(path).values())
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("adapted", ["lm_head", "model.embed_tokens"])
def test_a_soup_of_one_of_two_tied_embeddings_unties_them_and_says_so(
    tmp_path: Path, adapted: str, shards: int
) -> None:
    """A LoRA on one of two tied embeddings changes only that embedding's outputs; one tensor would change both."""
    write_expert(tmp_path / "experts" / "one", shapes={"lm_head": (50, 64)})
    if adapted == "model.embed_tokens":
        turn_into_embedding(tmp_path / "experts" / "one")
    base = write_base(tmp_path / "base", shards=shards, config={"tie_word_embeddings": True})
    library = ExpertLibrary.open(tmp_path / "experts")
    out = merge_into_base(library, Profile(weights={"one": 0.5}), base, tmp_path / "out")
    (before,) = [
        w for path in base.glob("*.safetensors") for n, w in oracles.read_tensors(path).items() if "embed" in n
    ]
    after = {n: w for path in out.glob("*.safetensors") for n, w in oracles.read_tensors(path).items()}
    ((a, b),) = pairs_in(tmp_path / "experts" / "one")
    delta = 0.5 * 2 * (b @ a if adapted == "lm_head" else (b @ a).T)
    changed, other = "lm_head.weight", "model.embed_tokens.weight"
    if adapted == "model.embed_tokens":
        changed, other = other, changed
    np.testing.assert_array_equal(after[other], before)
    assert oracles.relative_error(after[changed], before + delta) < 1e-6
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    record = read_soup_record(out)
    assert record is not None
    assert record.untied == "lm_head.weight"
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert index["lm_head.weight"] == index["model.embed_tokens.weight"]
        assert index.keys() == after.keys()


def tensors_in(folder: Path) -> dict[str, oracles.Matrix]:
    return {name: w for path in folder.glob("*.safetensors") for name, w in oracles.read_tensors(path).items()}


def turn_into_embedding(folder: Path) -> None:
    """Rename an expert's lm_head to the factors of an embedding of the same shape, A [R, V] and B [D, R]."""
    path = folder / "adapter_model.safetensors"
    (a, b) = oracles.read_tensors(path).values()
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    oracles.write_tensors(path, {f"{name}A": ("F32", b.T), f"{name}B": ("F32", a.T)})


def pairs_in(folder: Path) -> list[tuple[oracles.Matrix, oracles.Matrix]]:
    tensors = list(oracles.read_tensors(folder / "adapter_model.safetensors").values())
    return [(tensors[0], tensors[1])]


def test_tied_embeddings_that_nothing_changes_stay_tied(tmp_path: Path, library: ExpertLibrary) -> None:
    base = write_base(tmp_path / "base", config={"tie_word_embeddings": True})
    out = merge_into_base(library, PROFILE, base, tmp_path / "out")
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert "lm_head.weight" not in tensors_in(out)


def test_a_quantised_base_is_refused_by_name(tmp_path: Path, library: ExpertLibrary) -> None:
    base = write_base(tmp_path / "base", config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UnsupportedAdapterError, match=r"quantised \(gptq\)"):
        merge_into_base(library, PROFILE, base, tmp_path / "out")


def test_every_module_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (64, 32), "model.layers.0.mlp.up_porj": (96, 64)}
    write_expert(tmp_path / "experts" / "one", shapes=shapes)
    base = write_base(tmp_path / "base")
    with pytest.raises(IncompatibleExpertsError) as caught:
        merge_into_base(ExpertLibrary.open(tmp_path / "experts"), Profile(weights={"one": 1.0}), base, tmp_path / "out")
    assert "q_proj.weight: the base has shape [64, 64], but the adapter is for [64, 32]" in caught.value.what
    assert "up_porj.weight is not in the base (did you mean 'model.layers.0.mlp.up_proj.weight'?)" in caught.value.what


def test_another_base_than_the_experts_is_refused(tmp_path: Path, library: ExpertLibrary) -> None:
    base = write_base(tmp_path / "base")
    write_record(library["one"].folder, base={"name": "x", "fingerprint": "0" * 64})
    for name in ("two", "three"):
        write_record(library[name].folder, base={"name": "x", "fingerprint": "0" * 64})
    again = ExpertLibrary.open(tmp_path / "experts")
    with pytest.raises(IncompatibleExpertsError, match="trained on another base than the given one") as caught:
        merge_into_base(again, PROFILE, base, tmp_path / "out")
    assert "same_base=True" in caught.value.mend
    assert not (tmp_path / "out").exists()
    merge_into_base(again, PROFILE, base, tmp_path / "out", MergeOptions(same_base=True))


def test_the_right_fingerprint_is_accepted(tmp_path: Path, library: ExpertLibrary) -> None:
    base = write_base(tmp_path / "base")
    for name in NAMES:
        write_record(library[name].folder, base={"name": "x", "fingerprint": base_fingerprint(base)})
    merge_into_base(ExpertLibrary.open(tmp_path / "experts"), PROFILE, base, tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("missing base", InputError),
        ("no config", InputError),
        ("pickled", FileFormatError),
        ("missing shard", FileFormatError),
        ("truncated shard", FileFormatError),
        ("output exists", OutputExistsError),
        ("output is the base", UsageError),
        ("output in the base", UsageError),
    ],
)
def test_faults_leave_no_output(tmp_path: Path, library: ExpertLibrary, fault: str, kind: type[SoupError]) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    shards = sorted(base.glob("*.safetensors"))
    if fault == "missing base":
        shutil.rmtree(base)
    elif fault == "no config":
        (base / "config.json").unlink()
    elif fault == "pickled":
        (base / "model.safetensors.index.json").unlink()
    elif fault == "missing shard":
        shards[0].unlink()
    elif fault == "truncated shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-1])
    elif fault == "output exists":
        out.mkdir()
    elif fault == "output is the base":
        (base / "soup.json").write_text("{}")
        out = base
    else:
        out = base / "soup"
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(kind):
        MergedModel.of(library, PROFILE, base).check(out, overwrite=fault == "output is the base")
    with pytest.raises(kind):
        merge_into_base(library, PROFILE, base, out, overwrite=fault == "output is the base")
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_nothing_is_left_when_an_expert_is_found_damaged_half_way(tmp_path: Path, library: ExpertLibrary) -> None:
    base = write_base(tmp_path / "base")
    path = library["two"].folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match="nan"):
        merge_into_base(library, PROFILE, base, tmp_path / "out")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["base", "experts"]


def test_rank_is_refused(tmp_path: Path, library: ExpertLibrary) -> None:
    with pytest.raises(UsageError, match="is never truncated"):
        merge_into_base(library, PROFILE.replaced(rank=4), write_base(tmp_path / "base"), tmp_path / "out")


def test_a_value_beyond_the_bases_dtype_is_refused(tmp_path: Path) -> None:
    write_expert(tmp_path / "experts" / "one", alpha=1e7)
    base = write_base(tmp_path / "base", "F16")
    with pytest.raises(InputError, match=r"values beyond the range of torch\.float16"):
        merge_into_base(ExpertLibrary.open(tmp_path / "experts"), Profile(weights={"one": 1.0}), base, tmp_path / "out")


@pytest.mark.parametrize("queue", [EagerQueue, LazyQueue])
def test_a_queue_writes_the_same_model(
    tmp_path: Path, library: ExpertLibrary, monkeypatch: pytest.MonkeyPatch, queue: Any
) -> None:
    """The GPU's path with its threads, on the CPU as the device."""
    monkeypatch.setitem(blocks._BLOCK, "cpu", 640)
    base = write_base(tmp_path / "base", "BF16")
    wanted = merge_into_base(library, PROFILE, base, tmp_path / "wanted")

    def queued(base_MN: Tensor, soups: Any, device: torch.device) -> Iterator[FoldedBlock]:
        return queued_blocks(base_MN, soups, device, base_MN.dtype, queue())

    monkeypatch.setattr(model_shards, "folded_blocks", queued)
    found = merge_into_base(library, PROFILE, base, tmp_path / "found")
    for path in wanted.glob("*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes()
    write_expert(tmp_path / "large" / "one", alpha=1e7)
    large = ExpertLibrary.open(tmp_path / "large")
    with pytest.raises(InputError, match=r"values beyond the range of torch\.float16"):
        merge_into_base(large, Profile(weights={"one": 1.0}), write_base(tmp_path / "half", "F16"), tmp_path / "out")


@pytest.mark.gpu
def test_cpu_and_gpu_agree(tmp_path: Path, library: ExpertLibrary) -> None:
    base = write_base(tmp_path / "base", shards=1)
    on_cpu = merge_into_base(library, PROFILE, base, tmp_path / "cpu")
    on_gpu = merge_into_base(library, PROFILE, base, tmp_path / "gpu", MergeOptions(device="cuda"))
    one, two = (oracles.read_tensors(folder / "model.safetensors") for folder in (on_cpu, on_gpu))
    for name, tensor in one.items():
        assert oracles.relative_error(two[name], tensor) < 1e-6


def test_the_bases_own_record_is_not_the_soups(tmp_path: Path, library: ExpertLibrary) -> None:
    base = write_base(tmp_path / "base")
    for name in ("base.json", "expert.json"):
        (base / name).write_text('{"scores": "of the base"}')
    out = merge_into_base(library, PROFILE, base, tmp_path / "out")
    assert sorted(
        path.name for path in out.glob("*.json") if path.name in {"base.json", "expert.json", "soup.json"}
    ) == ["soup.json"]


def test_a_config_that_cannot_be_read_is_an_input_error(tmp_path: Path, library: ExpertLibrary) -> None:
    base = write_base(tmp_path / "base")
    (base / "config.json").unlink()
    (base / "config.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        merge_into_base(library, PROFILE, base, tmp_path / "out")
