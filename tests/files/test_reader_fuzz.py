"""Damaged and hostile files: the reader refuses them, or sees what the strict parser of strict_reader.py sees.

For every mutant both must refuse, or both must find the same tensors with the same bytes. No mutant may raise anything
but a SoupError, take long, or take memory beyond a multiple of its own size.
"""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from personalized_soups.errors import SoupError
from personalized_soups.files.reader import SafetensorsFile
from tests.files.strict_reader import BITS, Tensors, strictly_read

Header = dict[str, Any]

ROOT = Path(__file__).parents[2]
SEEDS = range(10)
FILES_A_SEED = 1100  # 11,000 files in all
SECONDS_A_FILE = 5.0  # they take about a thousandth; the rest is for a machine that is busy

SOUND: Header = {
    "__metadata__": {"format": "pt", "über": "größer"},
    "model.layers.0.q.weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
    "model.layers.0.k.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [48, 64]},
    "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [64, 64]},
    "scalar": {"dtype": "F64", "shape": [], "data_offsets": [64, 72]},
    "flags": {"dtype": "BOOL", "shape": [5], "data_offsets": [72, 77]},
    "odd": {"dtype": "I16", "shape": [2, 1, 2], "data_offsets": [77, 85]},
    "small": {"dtype": "F4", "shape": [3, 2], "data_offsets": [85, 88]},
}
DATA = bytes(index * 7 % 2 if 72 <= index < 77 else index * 7 % 256 for index in range(88))

ODD_VALUES: list[Any] = [
    -1, 0, 1, 2, 7, 8, 48, 87, 88, 89, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63), 8.0, 0.5,
    1e308, True, False, None, "", "8", "F32", [], [8], [[8]], {}, {"a": 1}, "\x1b[2J", "a" * 1000, [0, 2**62, 2**62],
    [2**62] * 30, [0] * 64, [1] * 65, [2**31, 2**31, 0], [float("nan")], [float("inf")], "é", "\ud800",
]  # fmt: skip


def assembled(header: Header | bytes, data: bytes = DATA, length_off_by: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) + length_off_by) % 2**64) + text + data


def flipped(dice: random.Random) -> bytes:
    """Flip, set, drop, double or add bytes anywhere."""
    content = bytearray(assembled(SOUND))
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(content))
        match dice.randrange(5):
            case 0:
                content[at] ^= 1 << dice.randrange(8)
            case 1:
                content[at] = dice.choice(b'0123456789[]{},":-.eE\\tfnu \n\x00\xff\xc3')
            case 2:
                del content[at : at + dice.choice([1, 1, 8, 100])]
            case 3:
                content[at:at] = content[at : at + dice.choice([1, 2, 40])]
            case _:
                content[at:at] = dice.randbytes(dice.choice([1, 3, 200]))
        if not content:
            break
    return bytes(content)


def cut(dice: random.Random) -> bytes:
    """Cut the file or let it run on."""
    content = assembled(SOUND)
    if dice.random() < 0.7:
        return content[: dice.randrange(len(content))]
    return content + dice.randbytes(dice.choice([1, 8, 4096]))


def lying_length(dice: random.Random) -> bytes:
    off_by = dice.choice([-8, -1, 1, 8, 88, 89, 2**31, 2**32, 2**63, 2**64 - 9, dice.randrange(2**64)])
    return assembled(SOUND, length_off_by=off_by)


def reordered(dice: random.Random) -> bytes:
    """Change nothing but the order of the entries and the spaces: a sound file."""
    items = list(SOUND.items())
    dice.shuffle(items)
    return assembled(
        json.dumps(dict(items), indent=dice.choice([None, 1, 4]), ensure_ascii=dice.random() < 0.5).encode()
    )


def odd_field(dice: random.Random) -> bytes:
    """Give a field of an entry, or a number within it, a value that it cannot or can just have."""
    header = json.loads(json.dumps(SOUND))
    for _ in range(dice.choice([1, 1, 1, 2])):
        entry = header[dice.choice(list(header))]
        field = dice.choice(["dtype", "shape", "data_offsets", "format", "more"])
        if field in {"shape", "data_offsets"} and entry.get(field) and dice.random() < 0.6:
            entry[field][dice.randrange(len(entry[field]))] = dice.choice(ODD_VALUES)
        elif dice.random() < 0.2:
            entry.pop(field, None)
        else:
            entry[field] = dice.choice([*ODD_VALUES, *BITS, "F33", "float32"])
    return assembled(header)


def moved(dice: random.Random) -> bytes:
    """Move, swap, stretch or share the places of entries: overlaps and holes, and now and then a sound file."""
    header = json.loads(json.dumps(SOUND))
    one, other = (header[name] for name in dice.sample([name for name in header if name != "__metadata__"], 2))
    match dice.randrange(5):
        case 0:
            one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
        case 1:
            one["data_offsets"] = list(other["data_offsets"])
        case 2:
            one["data_offsets"] = [place + dice.choice([-8, -1, 1, 8]) for place in one["data_offsets"]]
        case 3:
            one.update(other)
        case _:
            one["data_offsets"][dice.randrange(2)] += dice.choice([-4, 4])
            one["shape"] = [dice.randrange(20)]
            one["dtype"] = dice.choice(list(BITS))
    return assembled(header, DATA[: dice.choice([88, 88, 85])])


def odd_text(dice: random.Random) -> bytes:
    """Write a header that is odd as JSON: repeated names, nesting, huge numbers, other encodings."""
    text = json.dumps(SOUND)
    entry = json.dumps(SOUND["scalar"])
    depth = dice.choice([5, 300, 900, dice.randrange(900, 1100), 5000, 50_000])
    nest = dice.choice(["[", '{"a":', '[{"a":'])
    oddities: list[Callable[[], str]] = [
        lambda: text[:-1] + f', "scalar": {entry}}}',
        lambda: text.replace('"dtype": "F64"', '"dtype": "F64", "dtype": "F64"'),
        lambda: text[:-1] + f', "x": {nest * depth}',
        lambda: text[:-1] + f', "x": {"[" * depth}{"]" * depth}}}',
        lambda: text.replace("[3, 4]", "[" * depth + "]" * depth),
        lambda: text.replace("48", "4" + "8" * dice.choice([20, 4000, 5000])),
        lambda: text.replace("48", "4.8e1"),
        lambda: text.replace("[64, 72]", "[64, NaN]"),
        lambda: text.replace("[64, 72]", "[-Infinity, 72]"),
        lambda: text.replace("scalar", "\\ud83d"),
        lambda: text.replace("scalar", "\\ud83d\\ude00"),
        lambda: text.replace("scalar", "\\u0000\\u001b[2J"),
        lambda: text.replace("scalar", "__metadata__"),
        lambda: text.replace("scalar", "s" * dice.choice([1000, 100_000])),
        lambda: " " * dice.randrange(20) + text + "\n\t " * dice.randrange(9),
        lambda: "\ufeff" + text,
        lambda: f"[{text}]",
        lambda: dice.choice(["", "{}", "null", "1", '""', "[]", "{", "true"]),
    ]  # fmt: skip
    odd = dice.choice(oddities)()
    encoding = dice.choice(["utf-8"] * 6 + ["utf-16", "latin-1", "utf-32"])
    return assembled(odd.encode(encoding, "replace"))


MUTATORS: list[Callable[[random.Random], bytes]] = [
    flipped, flipped, cut, lying_length, reordered, odd_field, odd_field, odd_field, moved, odd_text, odd_text,
]  # fmt: skip


def seen(file: SafetensorsFile) -> Tensors:
    return {name: (entry.dtype, entry.shape, bytes(file.raw(name))) for name, entry in file.entries.items()}


def opened_or_none(path: Path) -> SafetensorsFile | None:
    began = time.process_time()
    fault = file = None
    try:
        file = SafetensorsFile.open(path)
    except SoupError as error:
        fault = error
    assert time.process_time() - began < SECONDS_A_FILE
    # a message that can be shown on a terminal, not the file
    assert fault is None or (fault.what.isprintable() and len(fault.what) < 1000)
    return file


def check_tensors(file: SafetensorsFile, truth: Tensors) -> None:
    for name, (dtype, shape, data) in truth.items():
        try:
            tensor = file.tensor(name)
        except SoupError:
            assert dtype in {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U16", "U32", "U64"}
            continue
        assert tuple(tensor.shape) == shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == data


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_files_are_refused_or_read_as_a_strict_parser_reads_them(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    path = tmp_path / "mutant.safetensors"
    num_sound = 0
    for number in range(FILES_A_SEED):
        content = MUTATORS[number % len(MUTATORS)](dice)
        path.write_bytes(content)
        truth = strictly_read(content)
        file = opened_or_none(path)
        assert (file is None) == (truth is None), content[:2000]
        if file is not None and truth is not None:
            num_sound += 1
            assert seen(file) == truth, content[:2000]
            check_tensors(file, truth)
        path.unlink()  # what is mapped must not be cut
    assert 0.08 * FILES_A_SEED < num_sound < 0.4 * FILES_A_SEED


def test_what_is_accepted_the_reference_reader_accepts(tmp_path: Path) -> None:
    """The other way round it need not be: the reference takes repeated names, for one."""
    dice = random.Random(100)
    path = tmp_path / "mutant.safetensors"
    num_compared = 0
    for _ in range(1500):
        content = dice.choice(MUTATORS)(dice)
        truth = strictly_read(content)
        if truth is not None:
            path.write_bytes(content)
            theirs = {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(content)}  # type: ignore[no-untyped-call]
            assert theirs == {name: data for name, (_, _, data) in truth.items()}
            num_compared += 1
    assert num_compared > 100


@pytest.mark.parametrize("seed", SEEDS)
def test_no_file_costs_more_memory_than_a_multiple_of_its_size(tmp_path: Path, seed: int) -> None:
    """Python's own objects: a parsed header takes at most some dozen times its text ("[]," is 64 bytes as a list)."""
    dice = random.Random(1000 + seed)
    path = tmp_path / "mutant.safetensors"
    tracemalloc.start()
    try:
        for number in range(len(MUTATORS) * 12):
            content = MUTATORS[number % len(MUTATORS)](dice)
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            opened_or_none(path)
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken < 100_000 + 40 * len(content), content[:2000]
            path.unlink()
    finally:
        tracemalloc.stop()


BEYOND_MEMORY = """
import resource, sys
from pathlib import Path
from personalized_soups.errors import SoupError
from personalized_soups.files.reader import SafetensorsFile
path = Path(sys.argv[1])
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), used + (600 << 20)))
huge = b'{"a":{"dtype":"U8","shape":[250000000000],"data_offsets":[0,250000000000]}}'
for length in (2**40, 2**63, 100_000_001, 99_999_999, len(huge)):
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + huge)
        file.truncate(200 << 20)
    try:
        SafetensorsFile.open(path)
    except SoupError as error:
        print(error.what)
"""


def test_a_length_that_lies_is_not_given_memory(tmp_path: Path) -> None:
    """In a process limited to 600 MiB more than it has: a sparse file of 200 MiB, and twice a header of 100 MiB."""
    command = [sys.executable, "-c", BEYOND_MEMORY, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=280)
    claims, json_fault, size = (re.compile(text) for text in ("the header claims", "not JSON: Extra data", "truncated"))
    for line, expected in zip(done.stdout.splitlines(), [claims] * 3 + [json_fault, size], strict=True):
        assert expected.search(line), done.stdout
