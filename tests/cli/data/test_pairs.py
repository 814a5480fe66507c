from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from personalized_soups.declare.fluency import FluencyBounds
from personalized_soups.declare.loader import dump, load
from personalized_soups.training.rollouts import read_pool

Run = Callable[..., tuple[int, str, str]]
DIMENSIONS = """
dimensions:
  size:
    about: How much is said.
    scorer: {kind: length, low: 2, high: 20}
    sides:
      concise: {instruction: rub it, end: low}
      informative: {instruction: wash it}
  tone:
    about: How it sounds.
    scorer: {kind: readability, low: -5, high: 5}
    sides:
      plain: {instruction: dry it, end: low}
"""
OPEN = FluencyBounds(typical=0.0, between_texts=1.0, between_tokens=1.0, max_deviations=1000.0, min_script=0.0)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "dimensions.yaml").write_text(DIMENSIONS)
    (tmp_path / "prompts.txt").write_text("wash the kettle\nrub the towel\ndry the old soap\n")
    return tmp_path


def _pairs(files: Path, base: Path, side: str, *more: object) -> list[object]:
    options = ["pairs", side, "--base", base, "--dimensions", files / "dimensions.yaml", "--device", "cpu"]
    options += ["--max-new-tokens", 16, "--min-gap", 0.02, "--num-samples", 5, "--prompts", files / "prompts.txt"]
    return [*options, "--out", files / f"{side}.jsonl", *more]


def test_a_pool_of_instructed_answers_serves_all_sides(psoups: Run, small_base: Path, files: Path) -> None:
    pool = ("--pool", files / "pool.jsonl", "--instructed", 2)
    code, out, _ = psoups(*_pairs(files, small_base, "concise", *pool))
    assert code == 0
    assert "words" in out
    assert "difference" in out
    sampled = read_pool(files / "pool.jsonl")
    counts = Counter(instruction for each in sampled for instruction in each.instructions)
    assert counts == {None: 9, "rub it": 2, "wash it": 2, "dry it": 2}
    prompts = {json.loads(line)["prompt"][0]["content"] for line in (files / "concise.jsonl").read_text().splitlines()}
    assert prompts <= {"wash the kettle", "rub the towel", "dry the old soap"}
    code, out, err = psoups(*_pairs(files, small_base, "plain", *pool, "--match-length", "--whole-sentences", "--json"))
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["words"]["chosen"] - record["words"]["rejected"] == pytest.approx(record["difference"]["mean"])
    assert record["difference"]["low"] <= record["difference"]["mean"] <= record["difference"]["high"]


def test_without_a_pool_the_sides_of_one_dimension_take_turns(psoups: Run, small_base: Path, files: Path) -> None:
    code, _, _ = psoups(*_pairs(files, small_base, "plain", "--instructed", 4, "--out", files / "p.jsonl"))
    assert code == 0


def test_more_instructed_answers_than_samples(psoups: Run, small_base: Path, files: Path) -> None:
    code, _, err = psoups(*_pairs(files, small_base, "concise", "--instructed", 6))
    assert code == 2
    assert "--instructed" in err
    assert "only 5 are sampled" in err


def test_bounds_are_calibrated_on_plain_answers_and_leave_others_out(
    psoups: Run, small_base: Path, files: Path
) -> None:
    pool = ("--pool", files / "pool.jsonl", "--instructed", 2)
    assert psoups(*_pairs(files, small_base, "concise", *pool))[0] == 0
    options = ["scorer", "calibrate", files / "pool.jsonl", "--base", small_base, "--device", "cpu"]
    code, _, err = psoups(*options, "--out", files / "fluency.yaml")
    assert code == 2
    assert "0.97 of the answers can't be accepted: of 9 answers, the checks reject script" in err
    code, out, err = psoups(*options, "--accept", 0.5, "--out", files / "fluency.yaml", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["num_answers"] == 9
    assert json.loads(out)["accepted"] >= 0.5
    bounds = load(files / "fluency.yaml", FluencyBounds)
    code, _, err = psoups(*options, "--accept", 0.5, "--out", files / "fluency.yaml")
    assert code == 2
    assert "--overwrite" in err
    assert psoups(*options, "--accept", 1.5, "--out", files / "x.yaml")[0] == 2

    fluency = files / "open.yaml"
    fluency.write_text(dump(OPEN.replaced(base=bounds.base)))
    again = ("--pool", files / "pool.jsonl", "--overwrite", "--fluency", fluency)
    before = (files / "concise.jsonl").read_text()
    code, _, err = psoups(*_pairs(files, small_base, "concise", *again))
    assert code == 0
    assert "15 of 15 answers are fluent" in err
    assert (files / "concise.jsonl").read_text() == before
    fluency.write_text(dump(OPEN.replaced(base=bounds.base, max_deviations=0.001)))
    code, _, err = psoups(*_pairs(files, small_base, "concise", *again))
    assert code == 2
    assert "no answer is fluent: of 15 answers, the checks reject likelihood 15" in err
    assert (files / "concise.jsonl").read_text() == before
    fluency.write_text(dump(OPEN.replaced(base="another")))
    code, _, err = psoups(*_pairs(files, small_base, "concise", *again))
    assert code == 2
    assert "another base" in err
