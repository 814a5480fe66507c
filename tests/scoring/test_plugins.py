"""Scorers from outside the catalogue: those of installed packages, and Python functions given as arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import DeclarationError
from personalized_soups.evaluation.scores import grade
from personalized_soups.scoring.scales import Scales
from personalized_soups.scoring.scorers import Scored, plugin_scorer, scorer_of
from personalized_soups.training.pairs import label_pool
from personalized_soups.training.rollouts import Sampled

MODULE = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
from personalized_soups.scoring.scorers import Scored

def exclamations(prompt, answer):
    return Scored(min(1.0, answer.count("!") / 4), valid=prompt != "")

def broken(prompt, answer):
    return 2.0
"""

CATALOGUE = """
dimensions:
  mood:
    about: how excited the answer sounds
    scorer: {kind: plugin, name: NAME}
    sides:
      calm: {instruction: Stay calm., end: low}
      excited: {instruction: Be excited.}
"""

# Score, then say whether the package was imported before its scorer was used.
SCRIPT = """
import json, sys
from pathlib import Path
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.scoring.scorers import scorer_of

site, catalogue = map(Path, sys.argv[1:])
loaded = load(catalogue, Catalogue)
early = (site / "imported").exists()
try:
    scored = scorer_of(loaded, "excited")("How?", "Like this!!")
    print(json.dumps({"early": early, "value": scored.value, "valid": scored.valid}))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "what": str(error.args[0]), "where": error.where}))
"""


def _install(site: Path, distribution: str, entry_points: str, module: str = MODULE) -> None:
    """Write the files that pip writes for a package of one module, `loudness.py`."""
    site.mkdir(exist_ok=True)
    (site / "loudness.py").write_text(module)
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[personalized_soups.scorers]\n{entry_points}")


def _score(tmp_path: Path, name: str) -> dict[str, object]:
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text(CATALOGUE.replace("NAME", name))
    site = tmp_path / "site"
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n{SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(site), str(catalogue)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_catalogue_names_a_scorer_of_an_installed_package(tmp_path: Path) -> None:
    _install(tmp_path / "site", "loudness", "exclamations = loudness:exclamations\n")
    assert _score(tmp_path, "exclamations") == {"early": False, "value": 0.5, "valid": True}


@pytest.mark.parametrize(
    ("name", "message", "was_imported"),
    [
        ("exclamation", "scorer 'exclamation'; the installed scorers are: broken, exclamations, gone", False),
        ("gone", "cannot be imported", True),
        ("broken", "returned 2.0, but it must return a Scored with a value in [0, 1]", True),
    ],
)
def test_an_unknown_or_broken_scorer_is_an_error_with_the_catalogues_line(
    tmp_path: Path, name: str, message: str, was_imported: bool
) -> None:
    entry_points = "exclamations = loudness:exclamations\nbroken = loudness:broken\ngone = loudness:gone\n"
    _install(tmp_path / "site", "loudness", entry_points)
    error = _score(tmp_path, name)
    assert error["error"] == "DeclarationError"
    assert message in str(error["what"])
    assert error["where"] == f"{tmp_path / 'catalogue.yaml'}:5: dimensions.mood.scorer.name"
    assert (tmp_path / "site" / "imported").exists() == was_imported


@pytest.mark.parametrize("way", [0, 1])
def test_the_page_of_the_documentation_runs(tmp_path: Path, way: int) -> None:
    page = Path("docs/howto/add_a_scorer.md").read_text(encoding="utf-8")
    blocks: dict[str, list[str]] = {}
    for language, text in re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL):
        blocks.setdefault(language, []).append(text)
    module, *scripts = blocks["python"]
    group = tomllib.loads(blocks["toml"][0])["project"]["entry-points"]["personalized_soups.scorers"]
    entry_points = "".join(f"{name} = {function}\n" for name, function in group.items())
    _install(tmp_path / "site", "loudness", entry_points, module)
    (tmp_path / "mood.yaml").write_text(blocks["yaml"][way])
    paths = f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), str(Path.cwd())]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + "\n".join(scripts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "".join(blocks["text"])


def test_two_packages_with_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path / "site", "loudness", "exclamations = loudness:exclamations\n")
    _install(tmp_path / "site", "noise", "exclamations = loudness:exclamations\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(DeclarationError, match="more than one package provides") as caught:
        plugin_scorer("exclamations")
    assert "loudness:exclamations" in caught.value.mend


def test_no_installed_scorer_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personalized_soups.scoring.plugins.entry_points", lambda **_: ())
    with pytest.raises(DeclarationError, match="the installed scorers are: none") as caught:
        plugin_scorer("exclamations")
    assert "personalized_soups.scorers" in caught.value.mend


def _declared(scorer: str = "") -> Catalogue:
    return Catalogue.model_validate_json(
        """{"dimensions": {"length": {"about": "words", SCORER "sides": {
            "concise": {"instruction": "Be brief.", "end": "low"},
            "informative": {"instruction": "Tell all."}}}}}""".replace("SCORER", scorer)
    )


def _letters(prompt: str, answer: str) -> Scored:
    return Scored(min(1.0, len(answer) / 10), valid=True)


def test_a_function_by_the_name_of_a_dimension_scores_its_sides() -> None:
    scorers = {"length": _letters}
    (graded,) = grade(["How?"], ["12345678"], _declared(), ["concise", "informative"], scorers=scorers)
    assert graded.toward == {"concise": pytest.approx(0.2), "informative": pytest.approx(0.8)}
    (pair,) = label_pool([Sampled("How?", ("123", "1234567"))], "concise", _declared(), scorers=scorers)
    assert (pair["chosen"], pair["rejected"]) == ("123", "1234567")
    scales = Scales(_declared(), scorers=scorers)
    assert scales.dimensions == {"length"}
    assert scales.scores("How?", "12345")[0]["value"] == 0.5


def test_a_sides_function_wins_over_the_dimensions_and_the_catalogues() -> None:
    catalogue = _declared('"scorer": {"kind": "length", "low": 0, "high": 4},')
    own = types.SimpleNamespace(scorer=lambda prompt, answer: Scored(1.0, valid=True)).scorer
    scorers = {"length": _letters, "informative": own}
    assert scorer_of(catalogue, "informative", scorers=scorers)("", "a") == Scored(1.0, valid=True)
    assert scorer_of(catalogue, "concise", scorers=scorers)("", "a").value == 0.1
    assert scorer_of(catalogue, "concise")("", "a").value == 0.25


def test_wrong_functions_are_named() -> None:
    with pytest.raises(DeclarationError, match="unknown side or dimension 'lenght'") as caught:
        scorer_of(_declared(), "concise", scorers={"lenght": _letters})
    assert caught.value.mend == "did you mean 'length'?"
    score = scorer_of(_declared(), "concise", scorers={"length": lambda _prompt, _answer: 0.5})  # type: ignore[dict-item]
    with pytest.raises(DeclarationError, match=r"returned 0\.5"):
        score("", "a")
