"""`psoups tune` stores what fits the user's data better, and nothing else."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from personalized_soups import ExpertWeights, Profile, ProfileStore, TextLikelihood, load_profile
from tests.cli.conftest import Run
from tests.experts import write_expert, write_record
from tests.mixing.worlds import open_model
from tests.users.tuning.worlds import Noise, Peak, Scores

Tune = Callable[..., tuple[int, str, str]]


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """The folder of the experts friendly and unfriendly, which are opposed, and plain."""
    folder = tmp_path / "experts"
    for seed, name in enumerate(("friendly", "unfriendly")):
        write_record(write_expert(folder / name, seed=seed), dimension="style")
    write_expert(folder / "plain", seed=2)
    return folder


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A file of three examples."""
    path = tmp_path / "texts.jsonl"
    rows = [("wash the kettle", "rub it dry"), ("soap", "wash it"), ("how do I wash it?", "with warm water")]
    path.write_text("".join(json.dumps({"prompt": prompt, "text": text}) + "\n" for prompt, text in rows))
    return path


@pytest.fixture
def tune(psoups: Run, experts: Path, examples: Path, small_base: Path) -> Tune:
    """Return a function that runs the command with the small base, the experts and the examples."""

    def run(*more: object, data: Sequence[object] = ("--examples", examples)) -> tuple[int, str, str]:
        loaded = ("--base", small_base, "--experts", experts, "--same-base", "--device", "cpu")
        return psoups("tune", "ada", *loaded, *data, *more)

    return run


def _scored_by(monkeypatch: pytest.MonkeyPatch, objective: Noise) -> None:
    """Make the likelihood of texts return an objective's scores."""

    def scores(self: TextLikelihood, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Scores:
        return objective.scores(candidates, items, draw=draw)

    monkeypatch.setattr(TextLikelihood, "scores", scores)


def test_better_weights_become_the_next_version_and_a_file(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scored_by(monkeypatch, Peak(3, {"friendly": 0.8}))
    store, out = tmp_path / "profiles.db", tmp_path / "ada.yaml"
    code, output, messages = tune("--profiles", store, "--out", out, "--budget", 60)
    assert code == 0, messages
    assert "ada is at version 1" in messages
    assert f"written to {out}" in messages
    with ProfileStore.open(store) as opened:
        profile = opened.get("ada").profile
    assert profile.weights["friendly"] == pytest.approx(0.8, abs=0.1)
    assert load_profile(out) == profile
    assert "allow_opposed" not in out.read_text()
    for text in ("friendly", f"{profile.weights['friendly']:.4g}", "search (2)", "validation (1)", "start", "found"):
        assert text in output

    # the next search starts from what is stored, in its --json form too
    code, output, messages = tune("--profiles", store, "--budget", 12, "--sigma", 0.01, "--json")
    assert code == 0, messages
    assert "starting from version 1" in messages
    result = json.loads(output)
    assert result["start"]["weights"] == profile.weights
    assert result["items"] == {"search": 2, "validation": 1}
    assert (result["user"], result["evaluations"], result["generations"]) == (
        "ada",
        12,
        2,
    )  # 4 + 3 ln 2 candidates a generation
    assert result["is_better"]
    assert result["version"] == 2
    with ProfileStore.open(store) as opened:
        assert opened.get("ada").profile.weights == result["weights"] == result["best"]["weights"]


def test_a_real_search_raises_the_likelihood_of_the_texts(
    tune: Tune, experts: Path, small_base: Path, tmp_path: Path
) -> None:
    code, output, messages = tune("--start", "base", "--budget", 30, "--sigma", 1.0, "--json")
    assert code == 0, messages
    result = json.loads(output)
    assert result["measure"] == "log-probability per token"
    from personalized_soups.users.tuning.examples import read_examples

    likelihood = TextLikelihood(open_model(small_base, experts), read_examples(tmp_path / "texts.jsonl"))
    candidates = [ExpertWeights(), ExpertWeights(result["best"]["weights"])]
    start, best = likelihood.scores(candidates, [0, 1, 2], draw=0).mean(axis=1)
    # the same numbers in another batch, to float32's rounding
    assert (result["start"]["all"], result["best"]["all"]) == pytest.approx((start, best), abs=1e-4)
    assert result["best"]["search"] > result["start"]["search"]
    assert result["version"] is None


def test_nothing_better_changes_nothing(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scored_by(monkeypatch, Peak(3, {"friendly": 0.8}))
    store, out = tmp_path / "profiles.db", tmp_path / "ada.yaml"
    with ProfileStore.open(store) as opened:
        opened.put(Profile(user="ada", weights={"friendly": 0.8}))
    code, output, messages = tune("--profiles", store, "--out", out, "--budget", 20)
    assert code == 0
    assert "nothing is written" in messages
    assert "0.8" in output
    assert not out.exists()
    with ProfileStore.open(store) as opened:
        assert len(opened.history("ada")) == 1


def test_the_base_has_no_profile(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Base(Noise):
        def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
            return -float(sum(abs(weight) > 0.2 for weight in candidate.weights.values() if isinstance(weight, float)))

    _scored_by(monkeypatch, Base(3))
    # weights are rounded to 4 decimals: so narrow a search finds the base again
    monkeypatch.setattr("personalized_soups.users.tuning.space._DECIMALS", 0)
    out = tmp_path / "ada.yaml"
    code, _, messages = tune("--start", "plain=1", "--out", out, "--budget", 40, "--sigma", 0.8)
    assert code == 0, messages
    assert "the base alone fits best" in messages
    assert not out.exists()


def test_weights_by_layer_are_written_as_json(
    tune: Tune, experts: Path, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class First(Noise):
        """The first layer wants 0.8, the second nothing."""

        def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
            plain: Any = candidate.weights.get("plain", {})
            return -float((plain.get("model.layers.0.*", 0.0) - 0.8) ** 2 + plain.get("*", 0.0) ** 2)

    _scored_by(monkeypatch, First(3))
    out = tmp_path / "ada.json"
    code, output, messages = tune("--layer-groups", 2, "--out", out, "--budget", 60, "--json")
    assert code == 0, messages
    result = json.loads(output)
    assert result["weights"]["plain"]["model.layers.0.*"] == pytest.approx(0.8, abs=0.2)
    written = json.loads(out.read_text())
    assert written == {"user": "ada", "weights": result["weights"]}
    model = open_model(small_base, experts, same_base=True)
    model.resolve(written["weights"])


def test_a_scorer_rates_answers_to_prompts(tune: Tune, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("wash the kettle\nsoap\n")
    data = ("--scorer", "informative", "--prompts", prompts, "--max-new-tokens", 4)
    code, output, messages = tune("--budget", 5, "--json", data=data)
    assert code == 0, messages
    result = json.loads(output)
    assert result["measure"] == "score of informative"
    assert result["items"] == {"search": 1, "validation": 1}


def _interrupting(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Press Ctrl-C so many times during the second generation."""
    objective = Peak(3, {"friendly": 0.8})

    def scores(self: TextLikelihood, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Scores:
        found = objective.scores(candidates, items, draw=draw)
        if len(objective.calls) == 2:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(TextLikelihood, "scores", scores)


def test_the_first_ctrl_c_keeps_what_was_found(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupting(monkeypatch, 1)
    code, _, messages = tune("--profiles", tmp_path / "profiles.db", "--population", 10)
    assert code == 0
    assert "stopped after 20 candidates" in messages
    assert "ada is at version 1" in messages


def test_the_second_ctrl_c_writes_nothing(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupting(monkeypatch, 2)
    store = tmp_path / "profiles.db"
    code, _, messages = tune("--profiles", store, "--population", 10)
    assert code == 130
    assert "interrupted" in messages
    with ProfileStore.open(store) as opened:
        assert opened.page() == []


def test_a_profile_that_another_program_changed_is_not_replaced(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, objective = tmp_path / "profiles.db", Peak(3, {"friendly": 0.8})

    def scores(self: TextLikelihood, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Scores:
        if not objective.calls:
            with ProfileStore.open(store) as opened:
                opened.put(Profile(user="ada", weights={"plain": 1.0}))
        return objective.scores(candidates, items, draw=draw)

    monkeypatch.setattr(TextLikelihood, "scores", scores)
    code, _, messages = tune("--profiles", store, "--budget", 40)
    assert code == 1
    assert "error: " in messages
    assert 'the weights found are {"friendly": 0.' in messages
    with ProfileStore.open(store) as opened:
        assert [each.profile.weights for each in opened.history("ada")] == [{"plain": 1.0}]


@pytest.mark.parametrize(
    ("more", "what", "where"),
    [
        (("--start", "hot=1"), "no expert is called 'hot'", "weights"),
        (("--start", "friendly=0.5,unfriendly=0.5"), "two sides of one dimension", "unfriendly"),
        (("--start", "friendly=2"), "the start has a weight of magnitude 2, but limit is 1.5", "--start"),
        (("--start", "friendly"), "is not `name=number`", "weights"),
        (("--layer-groups", 3), "layer_groups is 3, but experts adapt 2 numbered layers", "--layer-groups"),
        (("--layer-groups", 2, "--profiles", "p.db"), "do not fit into a stored profile", "--layer-groups, --profiles"),
        (("--sigma", 0), "sigma is 0", "--sigma"),
        (("--limit", -1), "limit is -1", "--limit"),
        (("--temperature", "inf"), "the temperature is infinite", "--temperature"),
        (("--out", "."), "the output path already exists", "--out ."),
        (("--scorer", "friendly"), "exactly one of --examples and --scorer", "--examples, --scorer"),
        (("--prompts", "prompts.txt"), "--prompts has no effect with --examples", "--prompts"),
    ],
)
def test_wrong_options_are_told(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, more: tuple[object, ...], what: str, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, messages = tune(*more)
    assert code == 2
    assert what in messages
    assert where in messages.partition("at: ")[2].partition("\n")[0]
    assert not (tmp_path / "p.db").exists()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ((), "exactly one of --examples and --scorer"),
        (("--scorer", "friendly"), "no prompts are given"),
        (("--scorer", "frendly", "--prompts", "prompts.txt"), "no side, dimension or installed scorer"),
        (("--scorer", "friendly", "--prompts", "nowhere.txt"), "the prompts can't be read"),
        (("--examples", "nowhere.jsonl"), "the file does not exist"),
        (("--examples", "empty.jsonl"), "the file holds no examples"),
    ],
)
def test_missing_data_are_told(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[object, ...], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("soap\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    code, _, messages = tune(data=data)
    assert code == 2
    assert what in messages


@pytest.mark.parametrize("option", ["--budget", "--population", "--batch-size", "--layer-groups"])
def test_zero_is_no_number(tune: Tune, option: str) -> None:
    code, _, messages = tune(option, 0)
    assert code == 2
    assert option in messages


def test_an_existing_file_is_replaced_only_if_asked(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scored_by(monkeypatch, Peak(3, {"plain": 0.8}))
    out = tmp_path / "ada.yaml"
    out.write_text("mine")
    code, _, messages = tune("--out", out)
    assert code == 2
    assert "the output path already exists" in messages
    assert out.read_text() == "mine"
    code, _, _ = tune("--out", out, "--overwrite")
    assert code == 0
    assert load_profile(out).weights["plain"] == pytest.approx(0.8, abs=0.05)


def test_scores_that_are_not_numbers_are_null_in_json(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Noise):
        def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
            return float("nan") if candidate.weights else 0.5

    _scored_by(monkeypatch, Broken(3))
    code, output, messages = tune("--budget", 8, "--json")
    assert code == 0, messages
    result: dict[str, Any] = json.loads(output)
    assert result["best"]["all"] is None
    assert result["start"]["all"] == 0.5
    assert not result["is_better"]


def test_a_missing_package_is_told(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "personalized_soups.errors.find_spec", lambda module: None if module == "cmaes" else find_spec(module)
    )
    code, _, messages = tune()
    assert code == 2
    assert "pip install 'personalized-soups[search]'" in messages
