"""A file of profiles is read a line at a time; the quick way and the careful one agree."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalized_soups.declare import profiles as profiles_module
from personalized_soups.declare.evidence import UserAnswers
from personalized_soups.declare.loader import load_data
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.profiles import each_once, read_profiles, read_user_lines
from personalized_soups.errors import DeclarationError, SoupError, UsageError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["sum", "ties"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from([*Profile.model_fields, "weigths"])
SOUND = st.fixed_dictionaries(
    {"weights": st.dictionaries(st.text(min_size=1, max_size=3), st.floats(-2, 2), min_size=1, max_size=3)},
    optional={"user": st.text(min_size=1, max_size=3), "normalize": st.sampled_from(["none", "sum"])},
)


def outcome(table: dict[str, object]) -> object:
    try:
        return load_data(table, Profile, "f:1")
    except SoupError as error:
        return str(error)


@given(st.dictionaries(KEYS, VALUES, max_size=4) | SOUND)
def test_both_ways_say_the_same(table: dict[str, object]) -> None:
    try:
        got: object = profiles_module._declared(json.dumps(table), "f:1")
    except SoupError as error:
        got = str(error)
    assert got == outcome(table)
    if isinstance(got, Profile):
        assert got.place("weights", "a") == "f:1: weights.a"


@pytest.mark.parametrize(
    ("line", "what", "where"),
    [
        ('{"weights": {"a": 1}, "weights": {"a": 2}}', "'weights' is repeated", ":2"),
        ('{"weights": {"a": 1, "\\u0061": 2}}', "'a' is repeated", ":2"),
        ('{"weights": {"a": NaN}}', "finite", ":2: weights.a"),
        ('{"weights": {"a": "1"}}', "valid number", ":2: weights.a"),
        ('{"user": "\\ud800", "weights": {"a": 1}}', "hex escape", ":2"),
        ("[" * 100_000, "not JSON", ":2"),
    ],
)
def test_what_is_wrong_with_a_line_is_told_with_its_place(tmp_path: Path, line: str, what: str, where: str) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text('{"user": "u1", "weights": {"a": 1}}\n' + line + "\n")
    lines = read_profiles(path)
    assert next(lines) == Profile(user="u1", weights={"a": 1.0})
    with pytest.raises(DeclarationError, match=what) as error:
        next(lines)
    assert error.value.where.endswith(where) or error.value.where.startswith(f"{path}{where}")


def test_one_user_twice_is_told_with_the_second_place(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text("".join(f'{{"user": "{user}", "weights": {{"a": 1}}}}\n' for user in ("u1", "u2", "u1")))
    with pytest.raises(UsageError, match="the user 'u1' has two profiles") as error:
        list(each_once(read_profiles(path)))
    assert error.value.where == f"{path}:3: user"


def test_a_byte_that_is_not_utf8_is_told_with_its_own_line(tmp_path: Path) -> None:
    # far behind the first block that is read at once
    path = tmp_path / "users.jsonl"
    lines = [b'{"user": "u%d", "weights": {"a": 1}}\n' % number for number in range(1, 2001)]
    path.write_bytes(b"".join([*lines[:1500], b'{"user": "\xff", "weights": {"a": 1}}\n', *lines[1500:]]))
    read = read_profiles(path)
    assert [profile.user for _, profile in zip(range(1500), read, strict=False)][-1] == "u1500"
    with pytest.raises(DeclarationError, match="not UTF-8: byte 0xff") as error:
        next(read)
    assert error.value.where == f"{path}:1501"


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"user": "u1", "weights": {"a": 1}}\r\n{"user": "u2", "weights": {"a": 1}}\r\n')
    assert [profile.user for profile in read_profiles(path)] == ["u1", "u2"]


def test_lines_at_fault_are_passed_over_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    good = '{"user": "u%d", "weights": {"a": 1}}'
    lines = [good % 1, "{", good % 2, "", "[]", good % 1, '{"user": "u4"}', good % 3]
    path.write_bytes("\n".join(lines).encode() + b'\n"\xc3\n' + (good % 4).encode() + b"\n\xff")
    errors: list[SoupError] = []
    assert [profile.user for profile in read_profiles(path, on_bad=errors.append)] == ["u1", "u2", "u1", "u3", "u4"]
    assert [error.where.removeprefix(f"{path}:").split(":")[0] for error in errors] == ["2", "5", "7", "9", "11"]
    with pytest.raises(DeclarationError, match="cannot be read"):
        list(read_profiles(tmp_path, on_bad=errors.append))
    assert len(errors) == 5


ANSWERED = {
    "question": {"id": "q1", "prompt": "How do I clean a lamp?", "a": "Dust it.", "b": "Happy to help!"},
    "answer": {"question": "q1", "choice": "b", "answered_at": "2025-06-01T12:00:00.123456Z"},
}
ANSWERS = {"user": "u2", "answers": [ANSWERED]}


def test_lines_of_answers_stand_among_the_profiles(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    lines = [{"user": "u1", "weights": {"a": 1.0}}, ANSWERS, {"user": "u2", "weights": {"a": 2.0}}]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second, third = read_user_lines(path)
    assert (first, third) == (Profile.model_validate(lines[0]), Profile.model_validate(lines[2]))
    assert isinstance(second, UserAnswers)
    assert second.place("answers", 0) == f"{path}:2: answers.0"
    (answered,) = second.answers
    assert (answered.question.id, answered.answer.choice) == ("q1", "b")
    assert answered.answer.answered_at == datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
    assert list(read_profiles(path)) == [first, third]  # for commands that need no answers


@pytest.mark.parametrize(
    ("change", "what", "where"),
    [
        ({"answers": []}, "the list of answers is empty", "answers"),
        ({"answers": [ANSWERED, ANSWERED]}, "answers 1 and 2 are to the same question 'q1'", "answers.1.question.id"),
        (
            {"answers": [{**ANSWERED, "answer": {"question": "q2", "choice": "a"}}]},
            "the answer is to the question 'q2'",
            "answers.0.answer.question",
        ),
        (
            {"answers": [{**ANSWERED, "answer": {"question": "q1", "choice": "c"}}]},
            "'c' is not",
            "answers.0.answer.choice",
        ),
        ({"user": " "}, "pattern", "user"),
        ({"version": 3}, "unknown key 'version'", "version"),
        ({"weights": {"a": 1.0}}, "unknown key 'answers'", "answers"),
    ],
    ids=["none", "twice", "another question", "choice", "user", "unknown key", "profile and answers"],
)
def test_a_line_of_answers_is_checked(tmp_path: Path, change: dict[str, object], what: str, where: str) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text("\n" + json.dumps({**ANSWERS, **change}))
    with pytest.raises(DeclarationError) as error:
        list(read_user_lines(path))
    assert what in error.value.what
    assert error.value.where.startswith(f"{path}:2: {where}")
