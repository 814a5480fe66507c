"""Indices that lie, and what is no file: nothing outside the folder is opened, nothing is waited for."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.errors import FileFormatError, SoupError
from personalized_soups.files.shards import Checkpoint
from tests import oracles
from tests.files.strict_reader import strictly_parsed

SEEDS = range(10)
INDICES_A_SEED = 200
SECONDS_A_FILE = 5.0  # they take about a thousandth; the rest is for a machine that is busy

SHARDS = {"a.safetensors": ["x", "y"], "b.safetensors": ["z"], "c.safetensors": ["u", "v", "w"]}
ODD_FILES: list[Any] = [
    "", ".", "..", "../a.safetensors", "../secret/model.safetensors", "/etc/passwd", "./a.safetensors",
    "a.safetensors/", "a.safetensors\0", "\0", "..\\secret", "C:\\a", "a" * 300, "é" * 200, "~", "A.safetensors",
    "a.bin", "a.PT", "b.ckpt", "missing.safetensors", "folder", "pipe", "text", "loop", "away", "c.safetensors",
    "\ud83d", "\x1b[2J", 0, None, True, ["a.safetensors"], {"a": 1}, "model.safetensors.index.json",
]  # fmt: skip


def write_checkpoint(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.mkdir(parents=True)
    for file, names in SHARDS.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        entries = {n: {"dtype": "U8", "shape": [4], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
        oracles.write_file(path, json.dumps(entries).encode(), "".join(4 * name for name in names).encode())
    (secret / "model.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "text").write_text("text")
    (folder / "loop").symlink_to("loop")
    (folder / "away").symlink_to("/dev/zero")


def odd_index(dice: random.Random) -> bytes:
    names: dict[str, Any] = {name: file for file, held in SHARDS.items() for name in held}
    index: Any = {"metadata": {"total_size": 24}, "weight_map": names}
    for _ in range(dice.choice([0, 1, 1, 1, 2])):
        match dice.randrange(6):
            case 0 | 1 | 2:
                names[dice.choice("xyzuvw")] = dice.choice(ODD_FILES)
            case 3:
                names[dice.choice(["t", "", "X", "\0"])] = dice.choice([*SHARDS, *ODD_FILES])
            case 4:
                names.pop(dice.choice("xyzuvw"), None)
            case _:
                index = dice.choice([index, [index], {"weight_map": [names]}, {"weight_map": None}, names, None, {}])
    text = bytearray(json.dumps(index).encode())
    if dice.random() < 0.2:
        text[dice.randrange(len(text))] = dice.choice(b'"{}:,[]\\x\xff\x00')
    return bytes(text)


def is_sound_index(text: bytes) -> bool:
    index = strictly_parsed(text)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        return False
    return all(file.removeprefix("./") in SHARDS for file in names.values())


def held_by(text: bytes) -> set[str]:
    files = {file.removeprefix("./") for file in json.loads(text)["weight_map"].values()}
    return {name for file in files for name in SHARDS[file]}


@contextmanager
def noting_opened_files(opened: list[str]) -> Iterator[None]:
    """Note every file that is opened, in the one way that nothing in Python can pass by."""
    is_on = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on and event == "open":
            opened.append(os.fspath(arguments[0]) if not isinstance(arguments[0], int) else "a descriptor")

    sys.addaudithook(hook)  # it stays for the life of the process
    try:
        yield
    finally:
        is_on = False


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_indices_lead_nowhere_else(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    folder = tmp_path / "model"
    write_checkpoint(folder)
    opened: list[str] = []
    num_sound = 0
    for _ in range(INDICES_A_SEED):
        text = odd_index(dice)
        (folder / "model.safetensors.index.json").write_bytes(text)
        checkpoint = None
        with noting_opened_files(opened):
            began = time.process_time()
            fault = None
            try:
                with warnings.catch_warnings(record=True) as caught_warnings:
                    warnings.simplefilter("always")
                    checkpoint = Checkpoint.open(folder)
            except SoupError as error:
                fault = error
            assert time.process_time() - began < SECONDS_A_FILE, text
            assert fault is None or (fault.what.isprintable() and len(fault.what) < 1000), text
        assert (checkpoint is not None) == is_sound_index(text), text
        if checkpoint is not None:
            num_sound += 1
            names = {name: file.removeprefix("./") for name, file in json.loads(text)["weight_map"].items()}
            held = held_by(text)
            assert {name: bytes(checkpoint.raw(name)) for name in checkpoint} == {
                name: 4 * name.encode() for name in held
            }
            is_right = names == {name: checkpoint.shard_of(name).path.name for name in held}
            assert len(caught_warnings) == (not is_right), text
            assert all(str(each.message).isprintable() and "None" not in str(each.message) for each in caught_warnings)
    assert {os.path.dirname(path) for path in opened} == {str(folder)}  # noqa: PTH120
    assert INDICES_A_SEED / 10 < num_sound < INDICES_A_SEED / 2


@pytest.mark.parametrize("kind", ["pipe", "folder", "away"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "a.safetensors"])
def test_pipes_folders_and_devices_are_refused_at_once(tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder)
    names = {name: file for file, held in SHARDS.items() for name in held}
    if name == "a.safetensors":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        (folder / name).unlink()
    (folder / kind).rename(folder / name)
    with pytest.raises(FileFormatError, match="not a regular file") as caught:
        Checkpoint.open(folder)
    assert caught.value.where == str(folder / name)
