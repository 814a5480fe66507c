from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import get_args

import pytest

from personalized_soups.errors import InputError
from personalized_soups.files import copies
from personalized_soups.files.copies import CopyMode, copy_file

WAYS: tuple[CopyMode, ...] = get_args(CopyMode)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(9 << 20))
    path.chmod(0o600)
    return path


@pytest.mark.usefixtures("umask_022")
@pytest.mark.parametrize("how", WAYS)
def test_every_way_gives_the_same_bytes_and_says_which_it_was(tmp_path: Path, source: Path, how: CopyMode) -> None:
    done = copy_file(source, tmp_path / "target", how)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert done in {how, "copy"}  # few file systems share blocks
    is_same = (tmp_path / "target").samefile(source)
    assert is_same == (done == "link")
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == (0o600 if is_same else 0o644)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_a_way_is_closed_a_plain_copy_is_made(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, how: CopyMode, error: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    for module, name in ((os, "link"), (os, "copy_file_range")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(copies, "reflink", lambda *_: False)
    assert copy_file(source, tmp_path / "target", how) == "copy"
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("how", WAYS)
def test_a_file_of_the_kernel_without_a_size_is_copied_whole(tmp_path: Path, how: CopyMode) -> None:
    copy_file(Path("/proc/self/status"), tmp_path / "target", how)
    assert "VmSize" in (tmp_path / "target").read_text()


@pytest.mark.parametrize("how", WAYS)
def test_a_link_is_followed(tmp_path: Path, source: Path, how: CopyMode) -> None:
    (tmp_path / "name").symlink_to(source)
    copy_file(tmp_path / "name", tmp_path / "target", how)
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("how", WAYS)
def test_a_target_that_is_there_stays_as_it_is(tmp_path: Path, source: Path, how: CopyMode) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(FileExistsError):
        copy_file(source, tmp_path / "target", how)
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize("how", WAYS)
def test_a_pipe_is_refused_at_once(tmp_path: Path, how: CopyMode) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        copy_file(tmp_path / "pipe", tmp_path / "target", how)
    assert not (tmp_path / "target").exists()


def test_a_copy_that_fails_leaves_no_file(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(OSError, match="No space left"):
        copy_file(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
