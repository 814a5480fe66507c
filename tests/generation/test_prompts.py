from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from personalized_soups.errors import InputError
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.generation.prompts import encode_prompt, prompt_text, read_prompts


def test_one_prompt_a_line_with_blank_lines_left_out(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfHow do I boil an egg?\r\n\n  Caf\xc3\xa9?  \n")
    assert read_prompts(path) == ["How do I boil an egg?", "Café?"]


def test_json_lines_with_a_prompt_each(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "One?"}\n{"prompt": "Two?", "topic": 3}\n')
    assert read_prompts(path) == ["One?", "Two?"]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.txt", b"fine\ncaf\xe9\n", ":2"),
        ("a.jsonl", b'{"prompt": "fine"}\n{"promt": "typo"}\n', ":2"),
        ("a.jsonl", b'{"prompt": ""}\n', ":1"),
        ("a.jsonl", b'["prompt"]\n', ":1"),
        ("a.jsonl", b"{\n", ":1"),
        ("a.txt", b"\n \n", ""),
        ("a.txt", b"\xef\xbb\xbf\nfine\n", ":1"),
        ("a.jsonl", b'{"prompt": "so \\ud800"}\n', ":1"),
        ("a.jsonl", b"[" * 100_000, ":1"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, where: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert caught.value.where == f"{path}{where}"
    assert caught.value.mend


def test_a_missing_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_prompts(tmp_path / "none.txt")


def test_the_chat_template_is_applied_once(small_base: Path) -> None:
    tokenizer = load_tokenizer(small_base)
    text = str(tokenizer.decode(encode_prompt(tokenizer, "wash")))
    assert text.count("<|user|>") == 1
    assert text.endswith("<|assistant|>")


def test_without_a_template_text_stays_as_it_is_and_chats_are_rejected(small_base: Path) -> None:
    tokenizer = load_tokenizer(small_base)
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "wash the kettle"), skip_special_tokens=True) == "wash the kettle"
    with pytest.raises(InputError, match="chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "wash"}])


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('System role not supported') }}", "rejects the messages: System role not supported"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{% for %}", "can't be read"),
        ({"a": "{{ messages }}", "b": ""}, "multiple chat templates"),
    ],
)
def test_a_template_that_raises_is_reported_with_the_prompts_place(small_base: Path, template: Any, what: str) -> None:
    tokenizer = load_tokenizer(small_base)
    tokenizer.chat_template = template
    for where, place in ((None, "the prompt that begins 'wash'"), ("prompts.txt:3", "prompts.txt:3")):
        with pytest.raises(InputError, match="chat template") as caught:
            encode_prompt(tokenizer, "wash", where=where)
        assert what in caught.value.what
        assert caught.value.where == place
        assert caught.value.mend


def test_a_scorer_sees_the_last_message() -> None:
    assert prompt_text("a") == "a"
    assert prompt_text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "u"
