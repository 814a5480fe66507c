from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personalized_soups.adapters.patterns import Patterns

# Expressions without nested repeats: those Python's own matcher, the oracle here, settles at once.
_ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\D",
        r"\w",
        r"\W",
        r"\s",
        r"\S",
        "[ab]",
        "[^a.]",
        "[a-c1]",
        r"[\d_]",
        "^",
        "$",
        r"\Z",
    ]
)
_REPEATS = st.sampled_from(["", "", "*", "+", "?", "*?", "+?", "{2}", "{0,1}", "{1,}", "{,2}"])


def _repeated(atom: str, repeat: str) -> str:
    return atom if atom in {"^", "$", r"\Z"} else atom + repeat


_PIECES = st.builds(_repeated, _ATOMS, _REPEATS)
_SEQUENCES = st.lists(_PIECES, max_size=4).map("".join)
_EXPRESSIONS = st.lists(
    st.one_of(
        _SEQUENCES,
        st.lists(_SEQUENCES, min_size=1, max_size=3).map(lambda branches: f"({'|'.join(branches)})"),
        _SEQUENCES.map(lambda inner: f"(?:{inner}){{2}}"),
        st.just(")|("),
    ),
    min_size=1,
    max_size=3,
).map("".join)
_NAMES = st.text("aab..1_ \n", max_size=8)


@settings(max_examples=400, deadline=None)
@given(_EXPRESSIONS, st.lists(_NAMES, min_size=1, max_size=5))
def test_an_automaton_matches_where_python_does(key: str, names: list[str]) -> None:
    expression = rf"(.*\.)?({key})$"
    for name in names:
        assert (Patterns([key]).first(name) == key) == (re.match(expression, name) is not None), (key, name)


def test_the_first_key_counts() -> None:
    patterns = Patterns(["v_proj", r"layers\.1\.(q|v)_proj", "q_proj", r".*"])
    found = [patterns.first(f"model.layers.{name}") for name in ("1.v_proj", "1.q_proj", "2.q_proj", "2.k_proj")]
    assert found == ["v_proj", r"layers\.1\.(q|v)_proj", "q_proj", ".*"]
    assert Patterns(["q_proj"]).first("model.xq_proj") is None


@pytest.mark.parametrize("key", [r"(a+)+b", r"(a|a)*b", r"(a*)*b", r"([a-z]+)*_"])
def test_expressions_that_python_would_run_for_years_end(key: str) -> None:
    # Python's own `re` would run into the suite's timeout.
    patterns = Patterns([key])
    assert patterns.first("a" * 2000) is None
    assert patterns.first("a" * 2000 + key[-1]) == key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (r"(a)\1", "has groupref"),
        ("(?=a)a", "has assert"),
        ("(?<!a)b", "has assert_not"),
        (r"\bq", "has at_boundary"),
        ("(?>a)", "has atomic_group"),
        ("a++", "has possessive_repeat"),
        ("(?i:a)", "sets flags"),
        ("(a{100}){100}", "needs more than 2000 states"),
        ("((a{40}){40}){40}|b{60000}", "needs more than 2000 states"),
        ("a" * 999 + "|b", "has 1001 characters"),
        ("(", "is not a valid regular expression"),
        ("(?i)a", "is not a valid regular expression"),
        ("(" * 490 + ")" * 490, "is not a valid regular expression"),
    ],
)
def test_what_no_small_automaton_does_is_refused(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Patterns(["q_proj", key])


def test_no_adapter_is_matched_for_ever() -> None:
    patterns = Patterns(["(a|b){600}"])

    def match_without_end() -> None:
        while True:
            patterns.first("c" * 100_000)

    with pytest.raises(ValueError, match="takes too long"):
        match_without_end()
