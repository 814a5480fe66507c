"""Files of prompts that are not the study's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from personalized_soups.declare.evaluation import ExternalRecipe
from personalized_soups.errors import InputError, OutputExistsError, UsageError
from personalized_soups.studies.external import draw_external, external_files, read_external

RECIPE = ExternalRecipe(num_prompts=3, max_prompt_tokens=4)
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def count_words(prompt: str) -> int:
    return len(prompt.split())


def written(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def instruction(text: str, *inputs: str) -> dict[str, object]:
    return {"id": "1", "instruction": text, "instances": [{"input": own, "output": "x"} for own in inputs]}


def test_both_kinds_of_lines_are_prompts(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"id": "koala_0", "prompt": " What is tea? "},
        instruction("Translate into French.", "Good day", "Good night"),
        instruction("Tell a joke.", ""),
    )
    path.write_text(path.read_text() + "\n  \n", encoding="utf-8")
    assert read_external(path) == ["What is tea?", "Translate into French.\n\nGood day", "Tell a joke."]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '"text"',
        '{"question": "What?"}',
        '{"prompt": "  "}',
        '{"prompt": 3}',
        '{"instruction": "Do it.", "instances": []}',
        '{"instruction": "Do it.", "instances": "none"}',
        '{"instruction": "Do it.", "instances": [{"output": "x"}]}',
        '{"instruction": 3, "instances": [{"input": ""}]}',
        '{"instruction": " ", "instances": [{"input": ""}]}',
        "\udcff",
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "What is tea?"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(InputError, match="not a JSON object with a prompt") as caught:
        read_external(path)
    assert caught.value.where == f"{path}:2"


def test_an_empty_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        read_external(written(tmp_path))
    with pytest.raises(InputError, match="can't be read: No such file"):
        read_external(tmp_path / "absent.jsonl")


def test_short_prompts_are_drawn_once_and_long_ones_counted(tmp_path: Path) -> None:
    prompts = [f"prompt number {at}" for at in range(8)]
    path = written(tmp_path, *({"prompt": text} for text in [*prompts, "one two three four five", "a b c d"]))
    stored = tmp_path / "drawn.json"

    def draw(seed: int, num_tokens: Callable[[str], int] = count_words, file: Path = stored) -> tuple[str, ...]:
        drawn = draw_external(path, RECIPE, num_tokens=num_tokens, seed=seed, stored=file)
        assert (drawn.file, drawn.num_in_file, drawn.num_skipped) == ("prompts.jsonl", 10, 1)
        return drawn.prompts

    first = draw(0)
    assert len(set(first)) == 3
    assert "one two three four five" not in first
    assert list(first) == [text for text in read_external(path) if text in first]  # in the order of the file
    assert draw(0) == first
    draws = {draw(seed, file=tmp_path / f"{seed}.json") for seed in range(8)}
    assert len(draws) > 1


def test_a_file_with_few_prompts_gives_all_of_them(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    drawn = draw_external(path, RECIPE, num_tokens=count_words, seed=0, stored=tmp_path / "drawn.json")
    assert drawn.prompts == ("a", "b")


def test_a_changed_file_and_a_file_of_long_prompts_are_refused(tmp_path: Path) -> None:
    path, stored = written(tmp_path, {"prompt": "a"}, {"prompt": "b"}), tmp_path / "koala.json"
    draw_external(path, RECIPE, num_tokens=count_words, seed=0, stored=stored)
    before = stored.read_bytes()
    written(tmp_path, {"prompt": "a"}, {"prompt": "c"})
    with pytest.raises(OutputExistsError, match="already drawn other prompts as 'koala'"):
        draw_external(path, RECIPE, num_tokens=count_words, seed=0, stored=stored)
    assert stored.read_bytes() == before
    with pytest.raises(InputError, match="all 2 prompts have more than 4 tokens"):
        draw_external(path, RECIPE, num_tokens=lambda _: 5, seed=0, stored=tmp_path / "new.json")


def test_names_and_files_are_read_from_the_option() -> None:
    assert external_files(["koala=a/b=c.jsonl", "own=x"]) == {"koala": Path("a/b=c.jsonl"), "own": Path("x")}
    for wrong in ("koala", "=file", "koala=", "../up=file", "a b=file", "a/b=file"):
        with pytest.raises(UsageError, match="not of the form NAME=FILE"):
            external_files([wrong])
    with pytest.raises(UsageError, match="the name 'koala' is given twice"):
        external_files(["koala=a", "koala=b"])


@pytest.mark.parametrize(
    ("name", "count", "begins"),
    [
        ("koala_180.jsonl", 180, "Can you list the top 20 films"),
        ("self_instruct_252.jsonl", 252, "The sentence you are given might be too wordy"),
    ],
)
def test_the_published_files_are_read_whole(name: str, count: int, begins: str) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"the public file {name} is not on this machine")
    prompts = read_external(DATA / name)
    assert len(prompts) == count
    assert prompts[0].startswith(begins)
    if name.startswith("self"):
        assert "\n\nIf you have any questions about my rate" in prompts[0]
