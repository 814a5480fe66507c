"""`psoups profile infer` from end to end, with scripted standard input."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups.cli.bases import LoadOptions
from personalized_soups.cli.serve.interview.pools import PoolSource
from personalized_soups.declare.evidence import AnsweredQuestion
from personalized_soups.errors import RunError
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.base_rewards import BaseRewards, TextItem
from personalized_soups.scoring.implicit_rewards import ImplicitRewards
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.answers.session import InferenceSession
from personalized_soups.users.answers.stopping import StoppingRule
from personalized_soups.users.answers.win_rate import WinRate
from personalized_soups.users.profiles.store import ProfileStore
from tests.cli.conftest import Run
from tests.cli.serve.interview.pools import DIMENSIONS, pool_of
from tests.experts import write_expert, write_record

Infer = Callable[..., tuple[int, str, str]]

# A user who wants friendly and concise answers, and cares more about friendliness.
WEIGHTS = {"concise": 2.0, "friendly": 4.0, "long": -2.0, "unfriendly": -4.0}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSOUPS_PROFILES", raising=False)


@pytest.fixture
def experts() -> Path:
    """The folder `experts` with four experts for the sides of two dimensions."""
    for seed, (name, dimension) in enumerate(DIMENSIONS.items()):
        write_record(write_expert(Path("experts") / name, seed=seed), dimension=dimension)
    return Path("experts")


@pytest.fixture
def pool(experts: Path, small_base: Path) -> QuestionPool:
    """A pool of 40 questions in the folder that the command looks into."""
    return pool_of(40, experts=experts, base=small_base).write("experts-questions")


@pytest.fixture
def infer(psoups: Run, experts: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch) -> Infer:
    """Return a function that runs the command for ada, with lines of standard input."""

    def run(stdin: Any, *more: object, user: str = "ada", win_rate: bool = False) -> tuple[int, str, str]:
        lines = io.StringIO("".join(f"{key}\n" for key in stdin)) if isinstance(stdin, str | list) else stdin
        monkeypatch.setattr(sys, "stdin", lines)
        given = ["--experts", experts, "--base", small_base, *([] if win_rate else ["--no-win-rate"]), *more]
        return psoups("profile", "infer", user, *given)

    return run


def _keys(pool: QuestionPool, weights: dict[str, float] = WEIGHTS, *, user: str = "ada", num: int = 10) -> str:
    """Return the keys that a noise-free user with these weights presses, one for each question."""
    session = InferenceSession(pool, user, stopping=StoppingRule(num))
    w = np.array([weights[name] for name in pool.names])
    keys = ""
    while (shown := session.next) is not None:
        a_is_better = bool(pool.differences[pool.index(shown.question.id)] @ w > 0)
        keys += "a" if a_is_better != shown.swapped else "b"
        session = session.answered(shown.question.id, "a" if a_is_better else "b")
    return keys


def _stored(user: str = "ada") -> list[AnsweredQuestion]:
    with ProfileStore.open("profiles.db") as store:
        return store.answers.of(user)


def _command(text: str, start: str) -> list[str]:
    """Return the arguments of the first psoups command in a message that starts so."""
    command = next(part for part in text.split("psoups ") if part.startswith(start))
    return shlex.split(command.split("\n")[0].split(";")[0])


def test_ten_answers_give_a_profile(infer: Infer, pool: QuestionPool, psoups: Run) -> None:
    code, out, err = infer(_keys(pool))
    assert code == 0
    assert "question 10 of 10" in err
    assert "question 11" not in err
    assert "You prefer friendly" in out or "You prefer concise and friendly" in out
    assert "Version 1 of the profile in profiles.db" in out

    stored = json.loads(psoups("profile", "get", "ada", "--json")[1])
    weights = stored["profile"]["weights"]
    assert set(weights) == {"concise", "friendly"}
    assert weights["friendly"] == max(weights.values()) == 0.6
    assert [each.answer.choice in {"a", "b"} for each in _stored()] == [True] * 10
    assert ",".join(f"{name}={weight:g}" for name, weight in weights.items()) in out


def test_json_has_the_estimate_and_nothing_else_is_on_standard_output(infer: Infer, pool: QuestionPool) -> None:
    code, out, err = infer(_keys(pool), "--json")
    result = json.loads(out)
    assert code == 0
    assert "question 1 of 10" in err
    by_dimension = {each["dimension"]: each for each in result["preferences"]}
    assert {name: each["preferred"] for name, each in by_dimension.items()} == {
        "style": "friendly",
        "length": "concise",
    }
    low, high = by_dimension["style"]["interval"]
    assert low < by_dimension["style"]["strength"] < high
    assert by_dimension["style"]["certainty"] == "clear"
    assert (result["done"], result["num_asked"], result["num_answers"], result["version"]) == (True, 10, 10, 1)
    assert 0.5 < result["agreement"] <= 1
    assert result["win_rate"] is None


def test_input_that_ends_early_is_kept_and_the_printed_command_continues(
    infer: Infer, pool: QuestionPool, psoups: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = _keys(pool)
    code, out, err = infer(keys[:3])
    assert (code, out) == (1, "")
    assert "standard input ended before question 4 was answered; 3 answers are kept in profiles.db" in err
    assert len(_stored()) == 3

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(keys[3:])))
    code, out, err = psoups(*_command(err, "profile infer"))
    assert code == 0
    assert "3 answers are stored already for ada" in err
    assert "question 3 of 10" not in err
    interrupted = psoups("profile", "get", "ada")[1]
    assert infer(keys, "--restart")[0] == 0
    assert psoups("profile", "get", "ada")[1] == interrupted


def test_a_user_who_quits_can_continue_or_use_the_answers_so_far(infer: Infer, pool: QuestionPool, psoups: Run) -> None:
    code, out, err = infer(_keys(pool)[:4] + "q", "--json")
    assert (code, json.loads(out)) == (0, {"user": "ada", "done": False, "num_asked": 4})
    assert "4 answers are kept in profiles.db" in err
    use = _command(err.split("Or use the answers so far")[1], "profile infer")
    code, out, _ = psoups(*use)
    assert (code, json.loads(out)["num_asked"]) == (0, 4)


def test_a_finished_interview_asks_nothing_and_writes_no_new_version(infer: Infer, pool: QuestionPool) -> None:
    assert infer(_keys(pool))[0] == 0
    code, out, err = infer("")
    assert code == 0
    assert "question" not in err.replace("experts-questions", "")
    assert "Version 1 of the profile" in out
    code, out, err = infer("ab", "--questions", 12)
    assert code == 0
    assert "question 12 of 12" in err


def test_a_wanted_certainty_stops_the_interview_early(infer: Infer, pool: QuestionPool) -> None:
    _, out, err = infer(_keys(pool, num=30), "--questions", 30, "--certainty", "0.85", "--json")
    result = json.loads(out)
    assert "question 1 of at most 30" in err
    assert 3 <= result["num_asked"] < 30
    assert result["agreement"] >= 0.85


def test_a_user_who_always_chooses_the_first_answer_is_told(infer: Infer, pool: QuestionPool) -> None:
    code, out, err = infer("a" * 10)
    assert code == 0
    assert "note: You chose the first answer all 6 times." in err
    assert "Note: You chose the first answer all 10 times." in out


def test_answers_that_contradict_each_other_are_told(infer: Infer, experts: Path, small_base: Path) -> None:
    # ten questions with the same difference of rewards, of which the user answers every second one the other way
    pool = pool_of(10, experts=experts, base=small_base)
    same = QuestionPool(pool.record, pool.questions, pool.a[:1].repeat(10, 0), pool.b[:1].repeat(10, 0), pool.prior)
    same.write("experts-questions")
    session, keys = InferenceSession(same, "ada"), ""
    while (shown := session.next) is not None:
        choice = "ab"[len(keys) % 2]
        keys += choice if not shown.swapped else "ba"[len(keys) % 2]
        session = session.answered(shown.question.id, choice)  # type: ignore[arg-type]
    _, out, _ = infer(keys, "--json")
    result = json.loads(out)
    assert result["notes"] == ["Your answers contradict each other, so the estimate is uncertain."]
    assert {each["certainty"] for each in result["preferences"]} == {"open"}


@pytest.mark.parametrize("key", ["s", "t"])
def test_no_profile_is_written_if_the_answers_show_no_preference(infer: Infer, pool: QuestionPool, key: str) -> None:
    code, out, err = infer(key * 10)
    assert code == 1
    assert "the answers show no preference, so no profile was written" in err
    assert "You chose neither answer in all 10 questions" in out
    assert "--questions 15" in err
    with ProfileStore.open("profiles.db") as store:
        assert store.page() == []


class _Lines:
    """Lines of standard input, with an event before one of them."""

    def __init__(self, keys: str, *, at: int, event: Callable[[], None]) -> None:
        self._keys, self._left, self._event = iter(keys), at, event

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        if self._left == 0:
            self._event()
        self._left -= 1
        return f"{next(self._keys)}\n"


def test_ctrl_c_keeps_the_answers(infer: Infer, pool: QuestionPool) -> None:
    def press() -> None:
        raise KeyboardInterrupt

    code, out, err = infer(_Lines("abab", at=2, event=press))
    assert (code, out) == (130, "")
    assert "interrupted; your answers are kept. Continue: psoups profile infer ada" in err
    assert len(_stored()) == 2


@pytest.mark.parametrize("does", ["answers the same question", "takes an answer back"])
def test_two_terminals_for_one_user_are_told_and_lose_nothing(infer: Infer, pool: QuestionPool, does: str) -> None:
    def act_elsewhere() -> None:
        session = InferenceSession(pool, "ada", tuple(_stored()))
        assert session.next is not None
        with ProfileStore.open("profiles.db") as store:
            if does == "takes an answer back":
                store.answers.undo("ada")
            else:
                store.answers.add("ada", session.answered(session.next.question.id, "tie").answers[-1])

    code, _, err = infer(_Lines(_keys(pool), at=2, event=act_elsewhere))
    assert code == 1
    assert "your last key was not stored" in err
    assert "end the other session, then continue with the stored answers: psoups profile infer ada" in err
    choices = [each.answer.choice for each in _stored()]
    assert (len(choices), choices[2:]) == ((1, []) if does == "takes an answer back" else (3, ["tie"]))


@pytest.fixture
def _answered(infer: Infer, pool: QuestionPool) -> None:
    assert infer(_keys(pool))[0] == 0


@pytest.mark.usefixtures("_answered")
def test_changed_experts_are_refused_with_the_command_that_makes_the_questions_again(
    infer: Infer, experts: Path, small_base: Path
) -> None:
    write_expert(experts / "concise", seed=99)
    code, _, err = infer("ab")
    assert code == 2
    assert "the experts differ from those for which the questions were made: concise changed" in err
    assert _command(err, "questions make") == [
        "questions", "make", "--experts", "experts", "--base", str(small_base), "--out", "experts-questions",
        "--overwrite",
    ]  # fmt: skip
    assert "--refit" in _command(err.split("or estimate the weights from the stored answers")[1], "profile infer")
    assert len(_stored()) == 10


@pytest.mark.usefixtures("_answered")
def test_answers_to_other_questions_are_refused_and_can_be_refitted_or_deleted(
    infer: Infer, experts: Path, small_base: Path, psoups: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_of(40, seed=1, experts=experts, base=small_base).write("experts-questions", overwrite=True)
    code, _, err = infer("ab")
    assert code == 2
    assert "10 of 10 stored answers are to questions that are not in experts-questions" in err
    refit, restart = _command(err, "profile infer"), _command(err.split("start again")[1], "profile infer")
    assert (refit[-2], restart[-2]) == ("--refit", "--restart")

    code, out, _ = psoups(*refit, "--same-base", "--device", "cpu", "--json")
    result = json.loads(out)
    assert (code, result["num_answers"], result["version"], result["agreement"]) == (0, 10, 2, None)

    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
    code, _, err = psoups(*restart)
    assert (code, "10 stored answers of ada are deleted" in err, _stored()) == (0, True, [])


def test_new_experts_are_named_and_the_questions_are_still_asked(
    infer: Infer, pool: QuestionPool, experts: Path
) -> None:
    write_expert(experts / "newcomer", seed=9)
    code, _, err = infer("q")
    assert (code, "question 1 of 10" in err) == (0, True)
    assert "the questions in experts-questions do not cover newcomer; make the questions again: psoups" in err


def test_a_small_pool_ends_the_interview(infer: Infer, experts: Path, small_base: Path) -> None:
    pool = pool_of(3, experts=experts, base=small_base).write("few")
    code, out, err = infer(_keys(pool, num=3), "--pool", "few")
    assert code == 0
    assert "question 3 of 3" in err
    assert "I would guess" not in out  # there is no question left to guess
    assert "More questions" not in out


def test_questions_are_made_in_the_current_folder_if_that_of_the_experts_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    source = PoolSource(None, [tmp_path.parent / "experts"], LoadOptions("tiny", "cpu", "float32"), quiet=True)
    assert source.default_folder() == Path("experts-questions")


def test_the_first_run_makes_the_questions_and_the_next_one_uses_them(
    psoups: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personalized_soups.cli.serve.interview.pools._NUM_QUESTIONS", 2)
    shapes = {f"model.layers.{layer}.mlp.up_proj": (384, 128) for layer in range(4)}
    for seed, name in enumerate(("friendly", "unfriendly")):
        write_expert(Path("experts") / name, seed=seed, rank=2, alpha=4, shapes=shapes)
    infer = ("profile", "infer", "ada", "--experts", "experts", "--base", "tiny", "--device", "cpu", "--no-win-rate")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nq\n"))
    code, _, err = psoups(*infer)
    assert code == 0
    assert "making 2 questions in experts-questions, once for these experts" in err
    pool = QuestionPool.open("experts-questions")
    assert (pool.names, pool.record.folders) == (("friendly", "unfriendly"), ("experts",))
    assert _stored()[0].question in pool.questions

    monkeypatch.setattr(sys, "stdin", io.StringIO("b\n"))
    code, out, err = psoups(*infer)
    assert code == 0
    assert "making" not in err
    assert out.startswith("2 answers")


def test_questions_are_made_next_to_the_experts(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    loading = LoadOptions("tiny", "cpu", "float32")
    inside = PoolSource(None, [Path("shared/experts")], loading, quiet=True)
    assert inside.default_folder() == Path("shared/experts-questions")
    outside = PoolSource(None, [tmp_path.parent / "experts"], loading, quiet=True)
    assert outside.default_folder() == tmp_path.parent / "experts-questions"


def test_questions_of_another_base_are_refused(infer: Infer, experts: Path, small_base: Path, tmp_path: Path) -> None:
    pool = pool_of(10, experts=experts, base=small_base)
    record = pool.record.replaced(base="other", base_fingerprint="0" * 64)
    QuestionPool(record, pool.questions, pool.a, pool.b, pool.prior).write("experts-questions")
    code, _, err = infer("ab")
    assert (code, "the questions were made with another base, other" in err) == (2, True)
    assert infer("q", "--same-base")[0] == 0


def test_a_pool_that_is_gone_is_told(infer: Infer, pool: QuestionPool) -> None:
    code, _, err = infer("q", "--pool", "gone")
    assert (code, "the folder of questions does not exist" in err, "psoups questions make" in err) == (2, True, True)


def test_without_prompts_the_command_that_makes_questions_is_given(infer: Infer, small_base: Path) -> None:
    code, _, err = infer("q")
    assert code == 2
    assert "there are no questions yet, and no prompts to make them from" in err
    assert _command(err, "questions make")[-4:] == ["--prompts", "prompts.txt", "--out", "experts-questions"]


def test_refitting_needs_answers(infer: Infer) -> None:
    code, _, err = infer("", "--refit", user="nobody")
    assert (code, "no answers of 'nobody' are stored" in err, "leave out --refit" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--certainty", "0.5"], "the certainty is 0.5"),
        (["--certainty", "1.5"], "the certainty is 1.5"),
        (["--noise", "0.5"], "the noise is 0.5"),
        (["--scale", "0"], "the scale is 0"),
        (["--scale", "inf"], "the scale is inf"),
        (["--rule", "informaton"], "did you mean 'information'?"),
        (["--refit", "--restart"], "--refit uses the stored answers"),
        (["--refit", "--simulate", "x.yaml"], "a simulated user has none"),
    ],
)
def test_options_that_make_no_sense_are_refused(infer: Infer, options: list[str], what: str) -> None:
    code, _, err = infer("q", *options)
    assert (code, what in err) == (2, True)
    assert not Path("profiles.db").exists()


def test_the_win_rate_of_the_soup_is_predicted(infer: Infer, pool: QuestionPool) -> None:
    code, out, _ = infer(_keys(pool), "--same-base", "--device", "cpu", "--json", win_rate=True)
    rate = json.loads(out)["win_rate"]
    assert code == 0
    assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
    assert rate["low"] < rate["high"]


def test_the_win_rate_has_the_rewards_of_the_pool(
    infer: Infer, pool: QuestionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = pool.record.replaced(centres=(0.5,) * len(pool.names), scales=(2.0,) * len(pool.names))
    replace(pool, record=record).write("experts-questions", overwrite=True)
    items = [TextItem("Prompt 0?", "First 0.0."), TextItem("Prompt 0?", "Second 0.0.")]
    found: list[tuple[Any, Any]] = []

    def seen(model: SoupModel, rewards: BaseRewards[TextItem], *_: object, **__: object) -> WinRate:
        unbounded = ImplicitRewards(model, experts=pool.names, beta=1.0).features(items)
        found.append((rewards.features(items), unbounded))
        return WinRate(0.5, 0.4, 0.6)

    monkeypatch.setattr("personalized_soups.users.answers.soup_win_rate.soup_win_rate", seen)
    assert infer(_keys(pool), "--same-base", "--device", "cpu", "--json", win_rate=True)[0] == 0
    ((features, unbounded),) = found
    assert np.abs(unbounded).max() > 0.01
    # bounded once: one more tanh would shrink the differences
    np.testing.assert_allclose(features, np.tanh((unbounded - 0.5) / 2.0), rtol=0, atol=1e-9)


def test_a_win_rate_that_cannot_be_predicted_loses_nothing(
    infer: Infer, pool: QuestionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("the batch does not fit", where="the GPU", mend="give a smaller batch")

    monkeypatch.setattr("personalized_soups.users.answers.soup_win_rate.soup_win_rate", fail)
    code, out, err = infer(_keys(pool), "--same-base", "--device", "cpu", "--json", win_rate=True)
    result = json.loads(out)
    assert (code, result["win_rate"], result["version"]) == (0, None, 1)
    assert "the win rate is not predicted: the batch does not fit; give a smaller batch" in err


@pytest.fixture
def persona() -> Path:
    """A simulated user who prefers each question's answer `a`, which contains the word First."""
    path = Path("persona.yaml")
    path.write_text("name: first\nphrases: {First: 1.0}\n")
    return path


def test_a_simulated_user_answers_and_nothing_is_stored(
    infer: Infer, pool: QuestionPool, persona: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSOUPS_PROFILES", "from-the-environment.db")
    code, out, err = infer("", "--simulate", persona, "--json")
    result = json.loads(out)
    assert (code, result["num_answers"], result["version"]) == (0, 10, None)
    assert list(Path().glob("*.db")) == []
    assert err.count("answer: A") + err.count("answer: B") == 10

    # the same interview, with the answers `a`
    session = InferenceSession(pool, "ada")
    while (shown := session.next) is not None:
        session = session.answered(shown.question.id, "a")
    weights = session.estimate.mean
    others = [index for index in range(len(pool)) if index not in session.asked]
    assert result["predicted"] == {
        "share": float(np.mean(pool.differences[others] @ weights > 0)),
        "num_questions": 30,
    }
    assert result["agreement"] == pytest.approx(session.agreement)


def test_a_simulated_user_is_stored_if_a_store_is_given_and_continues(
    infer: Infer, pool: QuestionPool, persona: Path
) -> None:
    stored = ("--simulate", persona, "--profiles", "profiles.db")
    assert infer("", *stored, "--questions", 4)[0] == 0
    assert [each.answer.choice for each in _stored()] == ["a"] * 4
    code, out, err = infer("", *stored)
    assert (code, "4 answers are stored already for ada" in err) == (0, True)
    assert [each.answer.choice for each in _stored()] == ["a"] * 10
    assert "The simulated user prefers the predicted answer in" in out


def test_a_persona_that_cannot_be_scored_is_refused_before_the_first_question(
    infer: Infer, pool: QuestionPool, persona: Path
) -> None:
    persona.write_text("weights: {frendly: 1.0}\n")
    code, _, err = infer("", "--simulate", persona)
    assert (code, "did you mean 'friendly'?" in err, "question 1" in err) == (2, True, False)
