from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, FileFormatError, InputError, UsageError
from tests.experts import write_expert, write_record


def test_a_library_lists_adapter_folders_by_name(tmp_path: Path) -> None:
    write_expert(tmp_path / "b")
    write_expert(tmp_path / "a")
    write_expert(tmp_path / ".a.1234.partial")
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("hello")
    write_record(tmp_path / "a", dimension="style", base={"name": "x", "fingerprint": "ff"})
    library = ExpertLibrary.open(tmp_path)
    assert list(library) == ["a", "b"]
    assert (library["a"].side, library["a"].dimension) == ("a", "style")
    assert library["a"].base.fingerprint == "ff"
    assert (library["b"].side, library["b"].dimension, library["b"].base.name) == (None, None, "base")


def test_an_expert_by_itself_and_several_roots_are_libraries(tmp_path: Path) -> None:
    write_expert(tmp_path / "x" / "a")
    write_expert(tmp_path / "y" / "b")
    write_expert(tmp_path / "z" / "a")
    assert list(ExpertLibrary.open(tmp_path / "x" / "a")) == ["a"]
    assert list(ExpertLibrary.open(tmp_path / "x", tmp_path / "y" / "b")) == ["a", "b"]
    with pytest.raises(UsageError, match="two experts have the name 'a'"):
        ExpertLibrary.open(tmp_path / "x", tmp_path / "z")


def test_a_broken_expert_does_not_close_the_library(tmp_path: Path) -> None:
    write_expert(tmp_path / "a")
    write_expert(tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"")
    library = ExpertLibrary.open(tmp_path)
    assert library["a"].adapter.config.rank == 4
    with pytest.raises(FileFormatError):
        _ = library["b"].adapter


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_experts_is_an_input_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        ExpertLibrary.open(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


def test_unknown_experts_are_all_named(tmp_path: Path) -> None:
    write_expert(tmp_path / "run_17")
    write_record(tmp_path / "run_17", side="friendly")
    (tmp_path / "run_17" / "expert.json").write_text('{"side": "friendly"}')
    library = ExpertLibrary.open(tmp_path)
    with pytest.raises(DeclarationError, match="'friendly', 'concise'") as caught:
        library.check(Profile(weights={"friendly": 1.0, "run_17": 1.0, "concise": 0.0}))
    assert caught.value.mend == "use 'run_17', the expert for that side"
    library.check(Profile(weights={"run_17": 1.0}))


def test_a_folder_that_may_not_be_entered_does_not_close_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_expert(tmp_path / "a")
    (tmp_path / "lost+found").mkdir()
    stat = os.stat

    def refusing(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if "lost+found" + os.sep in str(path):
            raise PermissionError(errno.EACCES, "denied", str(path))
        return stat(path, *args, **options)

    # a mode would do for everybody but root, who runs the suite in containers
    monkeypatch.setattr(os, "stat", refusing)
    assert list(ExpertLibrary.open(tmp_path)) == ["a"]


def test_a_name_too_long_for_the_file_system_is_no_folder() -> None:
    with pytest.raises(InputError, match="the folder does not exist"):
        ExpertLibrary.open("x" * 5000)


def test_one_folder_given_twice_is_one_expert(tmp_path: Path) -> None:
    write_expert(tmp_path / "a")
    assert list(ExpertLibrary.open(tmp_path, tmp_path / "a", tmp_path)) == ["a"]
