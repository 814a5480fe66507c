from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from personalized_soups.errors import FileFormatError, InputError, SoupError
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.strict_json import parse_json
from tests import oracles


def header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    random_ = np.random.default_rng(0)
    path = tmp_path / "sound.safetensors"
    tensors = {
        "b": ("F32", random_.normal(size=(3, 5))),
        "a": ("BF16", random_.normal(size=(4,))),
        "half": ("F16", random_.normal(size=(2, 2, 2))),
        "double": ("F64", random_.normal(size=(1,))),
        "scalar": ("F32", np.float32(0.1)),
        "empty": ("F32", np.zeros((0, 7))),
        "whole": ("I64", np.arange(3)),
    }
    oracles.write_tensors(path, tensors, {"format": "pt"})
    return path


def test_tensors_are_what_an_independent_reader_sees(sound: Path) -> None:
    file = SafetensorsFile.open(sound)
    truth = oracles.read_tensors(sound)
    assert list(file.entries) == list(truth)  # in the order of their bytes
    assert file.metadata == {"format": "pt"}
    for name, want in truth.items():
        tensor = file.tensor(name)
        assert tensor.shape == want.shape
        np.testing.assert_array_equal(tensor.double().numpy(), want)
        assert bytes(file.raw(name)) == oracles.raw_tensors(sound)[name][2]


def test_writing_to_a_tensor_does_not_reach_the_file(sound: Path) -> None:
    before = sound.read_bytes()
    SafetensorsFile.open(sound).tensor("b").zero_()
    assert sound.read_bytes() == before


def test_a_tensor_at_an_odd_place_is_still_right(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    values = np.array([1.5, -2.25], dtype="<f4")
    text = header(a=entry("U8", (1,), (0, 1)), b=entry("F32", (2,), (1, 9)))
    oracles.write_file(path, text, b"\x07" + values.tobytes())
    tensor = SafetensorsFile.open(path).tensor("b")
    assert tensor.tolist() == [1.5, -2.25]
    assert tensor.data_ptr() % 4 == 0  # not every processor reads across


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    oracles.write_file(tmp_path / "none.safetensors", b"{}", b"")
    assert dict(SafetensorsFile.open(tmp_path / "none.safetensors").entries) == {}


@pytest.mark.parametrize(
    "text",
    [
        header(a=entry()) + b"  \n\t",
        b"  " + header(a=entry()),
        header(a=entry(), __metadata__=None),
        header(__metadata__={}, a=entry()),
        header(a=entry(), z=entry(shape=(0, 3), offsets=(8, 8)), y=entry(shape=(0,), offsets=(0, 0))),
    ],
)
def test_what_safetensors_reads_is_read(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    oracles.write_file(path, text, np.array([1.5, -2.25], dtype="<f4").tobytes())
    file = SafetensorsFile.open(path)
    read = load_file(path)
    assert file.entries.keys() == read.keys()
    for name, want in read.items():
        assert file.tensor(name).shape == want.shape
        assert file.tensor(name).tolist() == want.tolist()
    assert file.metadata == {}


@pytest.mark.parametrize("site", ["git-lfs", "hawser"])  # the specification allows both
@pytest.mark.parametrize("extra", [b"", b"ext-0-foo sha256:0123\n" * 30])
def test_a_git_lfs_pointer_is_named_with_the_command(tmp_path: Path, site: str, extra: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(oracles.LFS_POINTER.replace(b"git-lfs", site.encode()) + extra)
    with pytest.raises(FileFormatError, match="this is a Git LFS pointer") as caught:
        SafetensorsFile.open(path)
    assert caught.value.where == str(path)
    assert "git lfs pull" in caught.value.mend
    with pytest.raises(FileFormatError, match="this is a Git LFS pointer"):
        parse_json(path.read_bytes(), path)


def test_numbers_beyond_json_are_read_where_python_writes_them(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="Infinity is not a JSON number"):
        parse_json(b"[Infinity]", tmp_path / "x.json")
    assert parse_json(b"[0.0, Infinity, -Infinity]", tmp_path / "x.json", constants=True) == [0, np.inf, -np.inf]


def test_a_type_that_torch_lacks_can_be_copied_and_not_computed(tmp_path: Path) -> None:
    path = tmp_path / "f8.safetensors"
    oracles.write_file(path, header(a=entry("F8_E8M0", (3,), (0, 3))), b"abc")
    file = SafetensorsFile.open(path)
    assert bytes(file.raw("a")) == b"abc"
    with pytest.raises(FileFormatError, match="dtype F8_E8M0, which does not exist in torch"):
        file.tensor("a")


LIES = {
    "no JSON": (b"{not json", 0),
    "not an object": (b"[]", 0),
    "not UTF-8": (b'{"\xff": 1}', 0),
    "a name repeated": (b'{"a":%b,"a":%b}' % (2 * (json.dumps(entry()).encode(),)), 8),
    "deep nesting": (b"[" * 100_000, 0),
    "a number of many digits": (b'{"a":' + b"9" * 10_000 + b"}", 0),
    "an entry that is no table": (b'{"a": 3}', 0),
    "a key too many": (header(a={**entry(), "more": 1}), 8),
    "a key too few": (b'{"a":{"dtype":"F32","shape":[2]}}', 8),
    "an unknown dtype": (header(a=entry("F33")), 8),
    "a dtype that is a list": (header(a={**entry(), "dtype": ["F32"]}), 8),
    "a negative size": (header(a=entry(shape=(-2,))), 8),
    "a size that is a bool": (header(a=entry(shape=(True, 2))), 8),
    "a size that is no whole number": (header(a=entry(shape=(2.0,))), 8),
    "a shape that overflows": (header(a=entry(shape=(2**62, 2**62))), 8),
    "offsets in reverse": (header(a=entry(offsets=(8, 0))), 8),
    "three offsets": (header(a=entry(offsets=(0, 4, 8))), 8),
    "offsets beyond the file": (header(a=entry(shape=(4,), offsets=(0, 16))), 8),
    "a shape that is not its span": (header(a=entry(shape=(3,))), 8),
    "tensors that overlap": (header(a=entry(), b=entry(offsets=(4, 12))), 12),
    "tensors of the same bytes": (header(a=entry(), b=entry()), 8),
    "a hole between tensors": (header(a=entry(), b=entry(offsets=(12, 20))), 20),
    "a hole at the start": (header(a=entry(offsets=(4, 12))), 12),
    "bytes that belong to nothing": (header(a=entry()), 12),
    "metadata that is no table of strings": (header(__metadata__={"a": 1}), 0),
    "NaN in the header": (b'{"__metadata__": NaN}', 0),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_with_the_file(tmp_path: Path, lie: str) -> None:
    text, num_bytes = LIES[lie]
    path = tmp_path / "lie.safetensors"
    oracles.write_file(path, text, b"\0" * num_bytes)
    with pytest.raises(FileFormatError) as caught:
        SafetensorsFile.open(path)
    assert caught.value.where == str(path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("length", [0xFFFFFFFFFFFFFFFF, 100_000_001, 50])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(FileFormatError, match=f"claims to have {length} bytes"):
        SafetensorsFile.open(path)


def test_a_file_cut_anywhere_is_refused(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            SafetensorsFile.open(cut)


def test_mutated_files_are_read_right_or_refused(sound: Path, tmp_path: Path) -> None:
    """A reader of damaged files may only refuse them, or see what the independent reader sees."""
    whole = sound.read_bytes()
    dice = random.Random(0)
    path = tmp_path / "mutant.safetensors"
    refused = 0
    for _ in range(500):
        mutant = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            mutant[dice.randrange(400)] = dice.choice(b'0123456789[]{},":aF\x00\xff')
        path.write_bytes(mutant)
        try:
            file = SafetensorsFile.open(path)
            seen = {name: bytes(file.raw(name)) for name in file.entries}
        except SoupError:
            refused += 1
            continue
        assert seen == {name: raw for name, (_, _, raw) in oracles.raw_tensors(path).items()}
    assert refused > 250


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt", "x.PTH", "x.ckpt"])
def test_a_pickle_is_refused_unopened_with_the_conversion(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(FileFormatError, match="loading a pickle can run any code") as caught:
        SafetensorsFile.open(tmp_path / name)
    assert "weights_only=True" in caught.value.mend
    assert ".safetensors" in caught.value.mend


def test_the_conversion_that_the_mend_names_works(tmp_path: Path) -> None:
    import shlex
    import subprocess
    import sys

    source = tmp_path / "my model" / "pytorch_model.bin"
    source.parent.mkdir()
    torch.save({"w": torch.arange(3.0)}, source)
    with pytest.raises(FileFormatError) as caught:
        SafetensorsFile.open(source)
    command = shlex.split(caught.value.mend.partition(": ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=280)
    assert SafetensorsFile.open(source.with_name("model.safetensors")).tensor("w").tolist() == [0, 1, 2]


def test_a_missing_file_and_a_missing_tensor_are_named(tmp_path: Path, sound: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        SafetensorsFile.open(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileFormatError, match="no tensor 'doubel'") as caught:
        SafetensorsFile.open(sound).tensor("doubel")
    assert caught.value.mend == "did you mean 'double'?"


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="surrogate"):
        parse_json(b'{"a\\ud800": 1}', tmp_path / "x.json")
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', tmp_path / "x.json") == {"a": "\U0001f600"}
