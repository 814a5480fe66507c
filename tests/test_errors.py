from __future__ import annotations

import pickle

import pytest

from personalized_soups.errors import (
    FileFormatError,
    RunError,
    SoupError,
    UsageError,
    check_extra,
    choose_from,
    nearest,
)


def test_an_error_keeps_its_parts_and_kind_across_processes() -> None:
    error = FileFormatError("truncated", where="a.safetensors", mend="copy it again")
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is FileFormatError
    assert (sent.what, sent.where, sent.mend, sent.exit_code) == ("truncated", "a.safetensors", "copy it again", 2)
    assert RunError("x", where="y", mend="z").exit_code == 1


def test_the_nearest_name_is_offered_else_the_list() -> None:
    assert nearest("freindly", ["friendly", "expert"]) == "friendly"
    assert nearest("xyz", ["friendly"]) is None
    assert choose_from("freindly", ["friendly", "expert"]) == "did you mean 'friendly'?"
    assert choose_from("xyz", ["b", "a"]) == "choose from: a, b"
    assert "no names to choose from" in choose_from("xyz", [])


def test_a_missing_extra_is_named_with_its_command() -> None:
    check_extra("dev", "pytest")
    with pytest.raises(UsageError) as caught:
        check_extra("train", "pytest", "no_such_trainer")
    assert isinstance(caught.value, SoupError)
    assert "no_such_trainer" in caught.value.what
    assert "pytest" not in caught.value.what
    assert "[train]" in caught.value.mend
