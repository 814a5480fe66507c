from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from personalized_soups.scoring.answer_classifiers import open_answer_classifier

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for name, word in (("warm", "glad"), ("cold", "whatever")):
        lines = [" ".join([word, *rng.choices(["one", "two", "three", "four", "five"], k=12)]) for _ in range(30)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return tmp_path


def test_a_classifier_is_trained_on_two_files(psoups: Run, files: Path) -> None:
    code, out, err = psoups("scorer", "train", files / "warm.txt", files / "cold.txt", "--out", files / "tone")
    assert (code, err) == (0, "")
    assert "30 high, 30 low, in 60 groups" in out
    assert "1.000 (95%: 1.000 to 1.000)" in out
    values = open_answer_classifier(files / "tone").values([("", "glad"), ("", "whatever")])
    assert values[0] > 0.9
    assert values[1] < 0.1
    options = ("scorer", "train", files / "warm.txt", files / "cold.txt", "--out", files / "tone")
    code, _, err = psoups(*options)
    assert code == 2
    assert "exists already" in err
    code, out, _ = psoups(*options, "--overwrite", "--keep-length", "--seed", 3, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["held_out"]["auc"]["value"] == 1.0
    assert (record["keep_length"], record["seed"]) == (True, 3)


def test_a_classifier_reads_the_hidden_states_of_a_base(psoups: Run, small_base: Path, files: Path) -> None:
    options = ["scorer", "train", files / "warm.txt", files / "cold.txt", "--base", small_base, "--device", "cpu"]
    code, out, _ = psoups(*options, "--out", files / "tone", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["base"] == str(small_base)
    assert record["held_out"]["auc"]["value"] > 0.9
    assert open_answer_classifier(files / "tone").values([("", "glad one two three four")])[0] > 0.5


@pytest.mark.parametrize(
    ("content", "what"),
    [("", "holds no text"), ("glad\n", "has 1 different texts"), (None, "can't be read"), ("both", "in both classes")],
)
def test_texts_that_cannot_be_learned_from(psoups: Run, files: Path, content: str | None, what: str) -> None:
    low = files / "low.txt"
    if content is not None:
        low.write_text((files / "warm.txt").read_text() if content == "both" else content)
    code, _, err = psoups("scorer", "train", files / "warm.txt", low, "--out", files / "tone")
    assert code == 2
    assert what in err
    assert not (files / "tone").exists()


def test_lengths_that_do_not_overlap_name_the_option(psoups: Run, files: Path) -> None:
    texts = [line + " more" * 30 for line in (files / "cold.txt").read_text().splitlines()]
    (files / "long.txt").write_text("\n".join(texts))
    options = ("scorer", "train", files / "warm.txt", files / "long.txt", "--out", files / "tone")
    code, _, err = psoups(*options)
    assert code == 2
    assert "--keep-length" in err
    assert psoups(*options, "--keep-length")[0] == 0
