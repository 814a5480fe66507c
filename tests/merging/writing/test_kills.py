"""Merges killed at random moments: the output is absent or whole, the next run succeeds and leaves no litter.

killing.py forks the runs and kills them; here is judged what it found. tests/files/test_kills.py kills bare writers of
folders at every single step; here it is whole commands, with their threads, shards, journal and many folders.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups import ExpertLibrary, Profile, merge, merge_into_base
from personalized_soups.errors import OutputExistsError
from personalized_soups.merging.writing.many import Merged, merge_many
from tests import oracles
from tests.experts import write_expert

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks")]

ROOT = Path(__file__).parents[2]
SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(6)
    for name, shape in {"self_attn.q_proj": (384, 256), "mlp.down_proj": (256, 640)}.items()
}
BUSY, THERE = "another run is writing this output", "the output folder exists already"
USERS = 5


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Write three experts, a base in six shards, and five users' profiles; a merge of them takes some 50 ms."""
    for index, name in enumerate("abc"):
        write_expert(tmp_path / "experts" / name, seed=index, rank=8, shapes=SHAPES)
    (tmp_path / "base").mkdir()
    random = np.random.default_rng(0)
    weight_map = {}
    for layer in range(6):
        file = f"model-{layer + 1:05d}-of-00006.safetensors"
        part = {f"{m}.weight": ("BF16", random.normal(size=s)) for m, s in SHAPES.items() if f"layers.{layer}." in m}
        oracles.write_tensors(tmp_path / "base" / file, part)
        weight_map.update(dict.fromkeys(part, file))
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    lines = [json.dumps({"user": f"u{n}", "weights": {"a": 0.1 * n + 0.1, "b": -0.5, "c": 1.0}}) for n in range(USERS)]
    (tmp_path / "users.jsonl").write_text("\n".join(lines))
    return tmp_path


def findings(mode: str, kind: str, world: Path, count: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.merging.writing.killing", mode, kind, str(world), str(count)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("kind", "count"), [("adapter", 14), ("overwrite", 14), ("model", 16), ("many", 14)])
def test_a_killed_merge_leaves_all_or_nothing_and_the_next_one_succeeds(world: Path, kind: str, count: int) -> None:
    first, *found = findings("kill", kind, world, count)
    whole, before = first["whole"], first["before"]
    assert len(found) == count
    assert len(whole) == (USERS if kind == "many" else 1)
    assert before != whole
    for each in found:
        assert each["code"] in {-9, 0}
        if kind == "many":
            assert each["after_kill"].items() <= whole.items()
        else:
            assert each["after_kill"] in ([before, whole] if kind == "overwrite" else [{}, whole])
        was_done = each["after_kill"] == whole
        if was_done and kind in {"adapter", "model"}:
            assert (each["again"], THERE in each["log"]) == (2, True)
        else:
            assert each["again"] == 0, each["log"]
        assert each["after_rerun"] == whole
        assert (each["left"], each["litter_after"]) == (["out"], [])
    # on a busy machine most runs may end before they are killed, but not all of them
    assert any(each["litter"] for each in found)


def test_of_two_merges_into_one_output_one_wins_and_the_other_says_so(world: Path) -> None:
    (first,) = findings("kill", "model", world, 0)
    found = findings("race", "model", world, 6)
    assert len(found) == 6
    for each in found:
        assert sorted(each["codes"]) == [0, 2]
        loser = each["log"][each["codes"].index(2)]
        assert BUSY in loser or THERE in loser
        assert (each["after"], each["litter"]) == (first["whole"], [])


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_merge_into_what_another_one_is_writing_says_so(world: Path, kind: str) -> None:
    (first,) = findings("kill", kind, world, 0)
    found = findings("meet", kind, world, 3)
    assert len(found) == 3
    for each in found:
        assert each["codes"] == [0, 2]
        assert BUSY in each["log"][1]
        assert (each["after"], each["litter"]) == (first["whole"], [])


@pytest.mark.parametrize("left", [[], ["journal"], ["journal", "old/soup.json"]])
def test_what_a_run_killed_at_its_very_end_left_is_taken_away(world: Path, left: list[str]) -> None:
    """Kill between the rename of the folder and the removal of its scratch folder, too short to hit by chance."""
    library = ExpertLibrary.open(world / "experts")
    profile = Profile(user="u0", weights={"a": 0.5, "b": -1.0})

    def leave(scratch: Path) -> None:
        for path in [scratch / name for name in left] or [scratch / "nothing"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (scratch / "nothing").unlink(missing_ok=True)

    merge(library, profile).write(world / "adapter")
    merge_into_base(library, profile, world / "base", world / "model")
    merge_many(library, [profile], world / "many")
    for scratch in (".adapter.partial", ".model.partial", "many/.u0.partial"):
        leave(world / scratch)
    with pytest.raises(OutputExistsError, match=THERE):
        merge(library, profile).write(world / "adapter")
    with pytest.raises(OutputExistsError, match=THERE):
        merge_into_base(library, profile, world / "base", world / "model")
    assert merge_many(library, [profile], world / "many") == Merged(0, 1)
    assert not list(world.rglob("*.partial"))
    assert (world / "adapter" / "soup.json").exists()
