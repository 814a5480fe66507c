"""A learned basis: its folder, its digest, and what is refused; comparisons read from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.errors import (
    DeclarationError,
    FileFormatError,
    IncompatibleExpertsError,
    InputError,
    OutputExistsError,
    UsageError,
)
from personalized_soups.scoring.base_rewards import BaseRewards, TextItem
from personalized_soups.scoring.item_features import ItemTable
from personalized_soups.systems.basis.basis import Basis, read_basis_record
from personalized_soups.systems.basis.data import read_comparisons
from personalized_soups.systems.basis.training import train_text_basis
from personalized_soups.systems.lore.model import LoreModel
from personalized_soups.systems.lore.training import LoreSettings, train_lore
from personalized_soups.systems.pref.model import PrefModel
from personalized_soups.systems.pref.training import PrefSettings, train_pref
from personalized_soups.systems.preference_models import Comparisons

STATEMENTS = [f"statement {number}" for number in range(6)]


def comparisons() -> Comparisons:
    """Four users with two opposed tastes compare all pairs of six statements."""
    a, b = np.triu_indices(6, 1)
    users, pair = np.divmod(np.arange(4 * len(a)), len(a))
    labels = np.where(users % 2 == 0, 1.0, 0.0)
    labels[::7] = 0.5
    return Comparisons(np.eye(6), a[pair], b[pair], labels, users)


def basis(kind: str = "pref") -> Basis[str]:
    data = comparisons()
    model: PrefModel | LoreModel = (
        train_pref(data, PrefSettings(rank=2))
        if kind == "pref"
        else train_lore(data, LoreSettings(rank=2, steps=20, least_weight=0))
    )
    return Basis(model, ItemTable(STATEMENTS), {"kind": "table"}, len(data))


@pytest.mark.parametrize("kind", ["pref", "lore"])
def test_a_basis_is_read_as_it_was_written(tmp_path: Path, kind: str) -> None:
    written = basis(kind)
    record = written.save(tmp_path / "basis")
    read: BaseRewards[str] = Basis.open(tmp_path / "basis", ItemTable(STATEMENTS))
    assert isinstance(read, Basis)
    assert read.kind == kind == record.kind
    assert read.digest == written.digest == record.digest
    assert read.names == ("reward-1", "reward-2")
    assert read.num_comparisons == 60
    np.testing.assert_array_equal(read.features(STATEMENTS), written.model.vectors)
    np.testing.assert_array_equal(read.features(STATEMENTS[4:2:-1]), written.model.vectors[4:2:-1])
    np.testing.assert_array_equal(read.model.users, written.model.users)
    np.testing.assert_array_equal(read.prior.mean, written.prior.mean)
    np.testing.assert_array_equal(read.prior.covariance, written.prior.covariance)
    assert sorted(path.name for path in (tmp_path / "basis").iterdir()) == ["basis.json", "basis.safetensors"]


def test_other_features_are_refused(tmp_path: Path) -> None:
    basis().save(tmp_path / "basis")
    with pytest.raises(IncompatibleExpertsError, match="other features"):
        Basis.open(tmp_path / "basis", ItemTable(STATEMENTS[::-1]))


def test_an_existing_folder_is_replaced_only_if_asked(tmp_path: Path) -> None:
    first, second = basis(), basis("lore")
    first.save(tmp_path / "basis")
    with pytest.raises(OutputExistsError):
        second.save(tmp_path / "basis")
    assert read_basis_record(tmp_path / "basis").kind == "pref"
    second.save(tmp_path / "basis", overwrite=True)
    assert read_basis_record(tmp_path / "basis").kind == "lore"


def test_the_digest_covers_rewards_kind_and_features() -> None:
    one = basis()
    moved = Basis(PrefModel(one.model.vectors + 1e-9, one.model.users, one.prior), one.items)
    other_items = Basis(one.model, ItemTable(STATEMENTS[::-1]))
    as_lore = Basis(LoreModel(one.model.vectors, one.model.users), one.items)
    assert len({one.digest, moved.digest, other_items.digest, as_lore.digest}) == 4
    assert one.digest == basis().digest


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "basis"
    with pytest.raises(FileFormatError, match=r"basis\.json is missing"):
        read_basis_record(folder)
    basis().save(folder)
    weights, record = folder / "basis.safetensors", folder / "basis.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileFormatError, match="not the one"):
        Basis.open(folder, ItemTable(STATEMENTS))
    weights.unlink()
    with pytest.raises(FileFormatError, match="missing"):
        Basis.open(folder, ItemTable(STATEMENTS))
    record.write_text(json.dumps({**json.loads(record.read_bytes()), "kind": "vpl"}), encoding="utf-8")
    with pytest.raises(FileFormatError, match="damaged: kind"):
        read_basis_record(folder)
    record.write_text("{", encoding="utf-8")
    with pytest.raises(FileFormatError, match="not JSON"):
        read_basis_record(folder)


LINE = {"user": "ann", "prompt": "How?", "a": "So.", "b": "Thus.", "choice": "a"}


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "comparisons.jsonl"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines), encoding="utf-8")
    return path


def test_comparisons_are_read(tmp_path: Path) -> None:
    labelled = {key: value for key, value in LINE.items() if key != "choice"}
    data = read_comparisons(
        written(
            tmp_path,
            LINE,
            {**LINE, "user": "bob", "choice": "skip"},
            {**LINE, "user": "cal", "a": "Thus.", "b": "So.", "choice": "b"},
            {**labelled, "b": "Never.", "label": 0.25},
        )
    )
    assert data.items == (TextItem("How?", "So."), TextItem("How?", "Thus."), TextItem("How?", "Never."))
    assert (data.a, data.b) == ((0, 1, 0), (1, 0, 2))
    assert data.labels == (1.0, 0.0, 0.25)
    # bob skipped his only pair, so he is no user
    assert (data.users, data.num_users) == ((0, 1, 0), 2)
    table = ItemTable(data.items)
    np.testing.assert_array_equal(data.comparisons(table).differences, [[1, -1, 0], [-1, 1, 0], [1, 0, -1]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**LINE, "choice": "c"}, "choice"),
        ({**LINE, "label": 0.5}, "exactly one"),
        ({key: value for key, value in LINE.items() if key != "choice"}, "exactly one"),
        ({**LINE, "b": "So."}, "same text"),
        ({**LINE, "user": " "}, "user"),
        ({**LINE, "winner": "a"}, "winner"),
        ({key: value for key, value in LINE.items() if key != "prompt"}, "prompt"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = written(tmp_path, LINE, line)
    with pytest.raises(DeclarationError, match=message) as caught:
        read_comparisons(path)
    assert f"{path}:3" in caught.value.where


def test_files_without_comparisons_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_comparisons(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="no comparisons"):
        read_comparisons(written(tmp_path))
    with pytest.raises(InputError, match="not a JSON object"):
        read_comparisons(written(tmp_path, [1]))
    (tmp_path / "broken.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(FileFormatError, match="not JSON"):
        read_comparisons(tmp_path / "broken.jsonl")


def test_one_user_is_refused(tmp_path: Path) -> None:
    data = read_comparisons(written(tmp_path, LINE))
    with pytest.raises(UsageError, match="of one user"):
        train_text_basis(data, ItemTable(data.items))
