"""The cache of model folders: made once, all or nothing, by one process at a time, and never used when damaged."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.bases import cache as cache_module
from personalized_soups.bases.cache import bases_folder, find_model, make_model
from personalized_soups.bases.gguf_model import write_model
from personalized_soups.bases.known_files import digest_once
from personalized_soups.bases.place import place_of
from personalized_soups.errors import FileFormatError, InputError, RunError, UsageError
from personalized_soups.files.cache_folder import cache_folder
from personalized_soups.files.digest import digest_file
from personalized_soups.files.locks import lock_file


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list to which the source of every conversion is added."""
    made: list[Path] = []

    def counted(path: Path, folder: Path, on_progress: Any = None) -> str:
        made.append(path)
        return write_model(path, folder, on_progress)

    monkeypatch.setattr(cache_module, "write_model", counted)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_the_variables_or_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "the cache"
    monkeypatch.delenv("PSOUPS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "psoups"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "psoups"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "psoups"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "psoups" / "Cache"


def test_a_file_is_converted_once_whatever_its_name(small_gguf: Path, tmp_path: Path, conversions: list[Path]) -> None:
    first = place_of(small_gguf)
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(small_gguf, copy)
    assert place_of(str(small_gguf)) == place_of(copy) == first
    assert conversions == [small_gguf]
    # the folder alone is left: neither a lock nor a scratch folder
    assert names(bases_folder()) == [".known", f"small-{digest_file(small_gguf)[:16]}"]


def test_an_unchanged_file_is_not_read_again(small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return digest_file(path)

    monkeypatch.setattr("personalized_soups.bases.known_files.digest_file", counted)
    own = tmp_path / "own.gguf"
    shutil.copyfile(small_gguf, own)
    assert digest_once(own) == digest_once(own) == digest_file(small_gguf)
    assert hashed == [own]
    data = bytearray(own.read_bytes())
    data[-1] ^= 1
    own.write_bytes(data)
    os.utime(own, ns=(1, 1))  # the same size, another time
    assert digest_once(own) == digest_file(own) != digest_file(small_gguf)


def _shorten(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _remove(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _break_record(folder: Path) -> None:
    (folder / "base.json").write_text("{")


def _old_format(folder: Path) -> None:
    text = (folder / "base.json").read_text()
    assert '"format": 1' in text
    (folder / "base.json").write_text(text.replace('"format": 1', '"format": 0'))


@pytest.mark.parametrize("damage", [_shorten, _flip, _remove, _break_record, _old_format])
def test_a_damaged_folder_is_noticed_and_made_again(
    small_gguf: Path, conversions: list[Path], damage: Callable[[Path], None]
) -> None:
    folder = Path(place_of(small_gguf))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "base.json"}
    damage(folder)
    assert find_model(digest_file(small_gguf)) is None
    assert place_of(small_gguf) == folder
    assert len(conversions) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "base.json"} == before


def test_a_copied_cache_is_used(
    small_gguf: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(place_of(small_gguf))
    copied = tmp_path / "other" / "bases" / folder.name
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    for path in copied.iterdir():
        os.utime(path, ns=(1, 1))
    monkeypatch.setenv("PSOUPS_CACHE", str(tmp_path / "other"))
    assert place_of(small_gguf) == copied
    assert len(conversions) == 1


def test_a_conversion_that_ends_early_leaves_nothing(small_gguf: Path, conversions: list[Path]) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place_of(small_gguf, stop)
    assert names(bases_folder()) == [".known"]
    assert Path(place_of(small_gguf)).is_dir()
    assert len(conversions) == 2


def test_a_file_that_cannot_be_converted_leaves_nothing(tmp_path: Path, small_gguf: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(small_gguf.read_bytes()[:-1000])
    with pytest.raises(FileFormatError, match="truncated"):
        place_of(short)
    assert names(bases_folder()) == [".known"]


def test_two_at_once_convert_once(small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the first converts: it waits for the first one's folder."""
    is_converting, may_go_on = threading.Event(), threading.Event()
    made: list[Path] = []

    def held(path: Path, folder: Path, on_progress: Any = None) -> str:
        made.append(path)
        is_converting.set()
        assert may_go_on.wait(60)
        return write_model(path, folder, on_progress)

    waits = threading.Event()

    def seen(path: Path, **options: Any) -> int | None:
        if is_converting.is_set():
            waits.set()
        return lock_file(path, **options)

    monkeypatch.setattr(cache_module, "write_model", held)
    monkeypatch.setattr(cache_module, "lock_file", seen)
    digest = digest_file(small_gguf)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(make_model, small_gguf, digest, "first")
        assert is_converting.wait(60)
        second = pool.submit(make_model, small_gguf, digest, "second")
        assert waits.wait(60)
        assert not second.done()
        may_go_on.set()
        assert first.result() == second.result() == bases_folder() / f"first-{digest[:16]}"
    assert made == [small_gguf]


def test_a_cache_that_cannot_be_written_names_the_variable(
    small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("PSOUPS_CACHE", str(tmp_path / "a file"))
    with pytest.raises(UsageError, match="cache folder cannot be written") as caught:
        place_of(small_gguf)
    assert "PSOUPS_CACHE" in caught.value.mend


def test_a_full_disk_names_the_variable(small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "write_model", full)
    with pytest.raises(RunError, match="no space is left") as caught:
        place_of(small_gguf)
    assert "PSOUPS_CACHE" in caught.value.mend
    assert names(bases_folder()) == [".known"]


def test_a_folder_of_the_user_in_the_cache_is_not_replaced(small_gguf: Path) -> None:
    folder = bases_folder() / f"small-{digest_file(small_gguf)[:16]}"
    folder.mkdir(parents=True)
    (folder / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="files that psoups did not write") as caught:
        place_of(small_gguf)
    assert "PSOUPS_CACHE" in caught.value.mend
    assert (folder / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "content", [b"just a text\n", b"", b"GGU", b"GGUF" + b"\x00" * 40, b"GGUF\x00\x00\x00\x03" + b"\0" * 40]
)
def test_a_file_that_only_has_the_name_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.gguf"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"not a GGUF file|the version 0|big-endian") as caught:
        place_of(path)
    assert caught.value.where == str(path)


def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GGUF file does not exist") as caught:
        place_of("models/none.gguf")
    assert caught.value.where == "models/none.gguf"


def test_a_gguf_file_of_another_name_is_recognized(small_gguf: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-1234"  # Ollama names files by their digest
    shutil.copyfile(small_gguf, blob)
    assert (Path(place_of(blob)) / "config.json").is_file()
