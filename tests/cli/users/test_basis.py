"""`psoups basis train` and `psoups basis show`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.hidden_states import HiddenStates
from personalized_soups.systems.basis.basis import Basis

Run = Callable[..., tuple[int, str, str]]

ANSWERS = [
    "Wash it.",
    "Rub it with a clean towel.",
    "Wash it with warm water and soap, then rub it dry.",
    "Rub it, then wash it, then rub it dry with a clean towel until it looks nice again.",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six users compare answers: even users prefer the shorter one, odd users the longer one."""
    lines = []
    for user in range(6):
        for first, a in enumerate(ANSWERS):
            for b in ANSWERS[first + 1 :]:
                better = "a" if (len(a) < len(b)) == (user % 2 == 0) else "b"
                lines.append(
                    {"user": f"u{user}", "prompt": "How do I wash the kettle?", "a": a, "b": b, "choice": better}
                )
    path = tmp_path / "comparisons.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_basis_orders_the_answers_as_its_users_do(tmp_path: Path, data: Path, small_base: Path, psoups: Run) -> None:
    options = ("--base", small_base, "--device", "cpu", "--rank", 2)
    code, out, err = psoups("basis", "train", "--data", data, *options, "--out", tmp_path / "basis", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert (shown["kind"], shown["base rewards"], shown["users"], shown["comparisons"]) == ("pref", 2, 6, 36)
    assert psoups("basis", "show", tmp_path / "basis", "--json") == (0, out, "")
    basis = Basis.open(tmp_path / "basis", HiddenStates.open(small_base, device="cpu"))
    rewards = (
        basis.features([TextItem("How do I wash the kettle?", answer) for answer in ANSWERS]) @ basis.model.users.T
    )
    for user in range(6):
        assert list(np.argsort(rewards[:, user])) == ([3, 2, 1, 0] if user % 2 == 0 else [0, 1, 2, 3])


def test_lore_and_a_table(tmp_path: Path, data: Path, small_base: Path, psoups: Run) -> None:
    options = ("--data", data, "--base", small_base, "--device", "cpu", "--out", tmp_path / "basis")
    code, out, err = psoups("basis", "train", *options, "--kind", "lore", "--rank", 3, "--pooling", "mean")
    assert code == 0, err
    assert "lore" in out
    assert "features: pooling" in out
    code, _, err = psoups("basis", "train", *options)
    assert code == 2
    assert "exists" in err
    code, out, err = psoups("basis", "train", *options, "--overwrite")
    assert code == 0, err
    assert "pref" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kind", "pret"), "at: --kind\n mend: did you mean 'pref'?"),
        (("--pooling", "lest"), "at: --pooling\n mend: did you mean 'last'?"),
        (("--data", "nowhere.jsonl"), "at: nowhere.jsonl\n mend: check the path"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_loaded(
    tmp_path: Path, data: Path, psoups: Run, options: tuple[str, str], message: str
) -> None:
    given = ("--data", data, "--base", "no base", "--out", tmp_path / "basis")
    code, out, err = psoups("basis", "train", *given, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "basis").exists()


def test_a_folder_without_a_basis_is_refused(tmp_path: Path, psoups: Run) -> None:
    code, _, err = psoups("basis", "show", tmp_path)
    assert code == 2
    assert "basis.json is missing" in err
