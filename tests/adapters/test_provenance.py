from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups.adapters.provenance import (
    BaseRecord,
    DataRecord,
    ExpertRecord,
    library_versions,
    read_expert_record,
    read_soup_record,
    write_record,
)
from personalized_soups.errors import FileFormatError


def record() -> ExpertRecord:
    return ExpertRecord(
        side="friendly",
        dimension="style",
        base=BaseRecord(name="tiny", fingerprint="ab12"),
        recipe={"lora": {"rank": 8}},
        data=DataRecord(name="pairs.jsonl", blake3="00ff", num_pairs=3),
        seed=7,
        metrics={"accuracy": 0.5},
        versions=library_versions("torch", "no_such_package"),
    )


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_record(tmp_path, record())
    assert path.name == "expert.json"
    assert read_expert_record(tmp_path) == record()


def test_equal_records_have_equal_bytes(tmp_path: Path) -> None:
    first = write_record(tmp_path, record()).read_bytes()
    assert write_record(tmp_path, record()).read_bytes() == first


def test_versions_name_what_is_installed() -> None:
    assert set(record().versions) == {"python", "personalized_soups", "torch"}


def test_a_folder_without_records_has_none(tmp_path: Path) -> None:
    assert read_expert_record(tmp_path) is None
    assert read_soup_record(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{", "expert.json"),
        ('{"side": 3}', "expert.json: side"),
        (json.dumps({"side": "a", "colour": "red"}), "expert.json: colour"),
        (json.dumps({"side": "a", "format_version": 2}), "expert.json: format_version"),
        ('{"side": "a", "metrics": {"loss": NaN}}', "expert.json"),
        ("[" * 100_000, "expert.json"),
    ],
)
def test_a_damaged_record_is_told_with_its_key(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "expert.json").write_text(text)
    with pytest.raises(FileFormatError, match="the record is invalid") as caught:
        read_expert_record(tmp_path)
    assert where in caught.value.where


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "expert.json").write_text('{"side": "friendly", "recipe": {"beta": NaN}}')
    with pytest.raises(FileFormatError, match="NaN is not a JSON number"):
        read_expert_record(tmp_path)
