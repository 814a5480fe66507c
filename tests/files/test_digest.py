from __future__ import annotations

import os
from pathlib import Path

import pytest

from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.files.digest import BackgroundDigests, digest_file

# From the BLAKE3 team's test_vectors.json: the first 32 bytes for inputs of 0 and 1025 bytes that count up to 250.
VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
}


def counted(num_bytes: int) -> bytes:
    return bytes(index % 251 for index in range(num_bytes))


@pytest.mark.parametrize("num_bytes", VECTORS)
def test_digests_are_those_of_the_specification(tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "x").write_bytes(counted(num_bytes))
    assert digest_file(tmp_path / "x") == VECTORS[num_bytes]


def test_large_files_go_another_way_to_the_same_digest(tmp_path: Path) -> None:
    from blake3 import blake3

    data = counted((1 << 20) + 3)
    (tmp_path / "x").write_bytes(data)
    assert digest_file(tmp_path / "x") == blake3(data).hexdigest()


def test_files_are_hashed_in_the_background(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with BackgroundDigests([tmp_path / "x", tmp_path / "x"]) as digests:
        assert dict(digests.results()) == {tmp_path / "x": VECTORS[0]}


def test_files_may_be_added_as_they_become_whole(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(20)]
    with BackgroundDigests(num_threads=3) as digests:
        for name in names:
            (tmp_path / name).write_bytes(counted(1025))
            digests.add(tmp_path / name)
        assert dict(digests.results()) == {tmp_path / name: VECTORS[1025] for name in names}


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(FileFormatError, match="not a regular file"):
        digest_file(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with BackgroundDigests([tmp_path / "x"]) as digests, pytest.raises(InputError) as caught:
        digests.results()
    assert caught.value.where == str(tmp_path / "x")
