"""Arguments that the library's errors name, as options of the running command."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import personalized_soups
from personalized_soups.cli.app import build_app
from personalized_soups.cli.arguments import name_options, options_of, with_options
from personalized_soups.errors import SoupError, UsageError

_PACKAGE = Path(personalized_soups.__file__).parent
# Options of vLLM, pip and llama.cpp, which messages name so that a user can call these programs with them.
_OF_OTHERS = {"--max-lora-rank", "--no-deps", "--force-reinstall", "--upgrade", "--merge"}

OPTIONS = options_of(typer.main.get_command(build_app()).commands["merge"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("give rank=16", "give --rank 16"),
        ("give rank=16, energy=0.9, or else", "give --rank 16, --energy 0.9, or else"),
        ("fold it (into_base=BASE); wait", "fold it (--into-base BASE); wait"),
        ("pass same_base=True.", "pass --same-base."),
        ("leave target=vllm out: vLLM loads it", "leave --for vllm out: vLLM loads it"),
        ('take device="cuda:0"', "take --device cuda:0"),
        ("give lambda=0.5", "give --lambda 0.5"),
        ("give rank=...", "give --rank ..."),
        ("write weights=elementary=0.6,concise=0.6", "write --weights elementary=0.6,concise=0.6"),
        ("the experts' rank=8 and the base's rank=4", "the experts' --rank 8 and the base's --rank 4"),
    ],
)
def test_an_argument_becomes_an_option(text: str, written: str) -> None:
    assert with_options(text, OPTIONS) == written


@pytest.mark.parametrize(
    "text",
    [
        "no expert is called 'rank=16'",
        'no expert is called "it\'s rank=16"',
        "write `rank=16` into the file",
        "the prompt “give rank=16”",
        "steps=3 is no option of this command",
        "experts/rank=16/adapter is no folder",
        "the rank is 16, the device cpu",
        "tensor.rank=3",
        "rank = 16",
        "rank=",
    ],
)
def test_other_text_is_copied(text: str) -> None:
    assert with_options(text, OPTIONS) == text


@pytest.mark.parametrize(
    ("where", "written"),
    [
        ("rank", "--rank"),
        ("rank, energy", "--rank, --energy"),
        ("target=vllm", "--for vllm"),
        ("lambda", "--lambda"),
        ("weights: weights.concise", "--weights: weights.concise"),
        ("profile", "profile"),  # an argument of the command, which has no option
        ("experts/rank", "experts/rank"),
        ("experts", "experts"),  # a folder that was given on the command line
        ("out: rank", "out: rank"),
        ("gamma", "gamma"),
    ],
)
def test_a_place_becomes_an_option_unless_the_user_gave_it(where: str, written: str) -> None:
    error = UsageError("rank=1", where=where, mend="give rank=16")
    name_options(error, OPTIONS, given={"experts", "out"})
    assert (error.what, error.where, error.mend) == ("--rank 1", written, "give --rank 16")


def test_every_command_names_its_options_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SoupError("the limit is 1", where="after", mend="give skip_bad=True or limit=2")

    monkeypatch.setattr("personalized_soups.cli.serve.stored_profiles.check_extra", fail)
    output = CliRunner().invoke(build_app(), ["profile", "list"]).stderr
    assert "at: --after\n" in output
    assert "give skip_bad=True or --limit 2" in output


def test_the_library_names_no_option() -> None:
    found = [
        f"{path.relative_to(_PACKAGE)}:{token.start[0]}: {option}"
        for path in sorted(_PACKAGE.rglob("*.py"))
        if path.relative_to(_PACKAGE).parts[0] != "cli"
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type not in {tokenize.NAME, tokenize.OP, tokenize.NEWLINE, tokenize.NL}
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", token.string)
        if option not in _OF_OTHERS
    ]
    assert not found
