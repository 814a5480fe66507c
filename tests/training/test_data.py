from __future__ import annotations

import json
from pathlib import Path

import pytest
from blake3 import blake3

from personalized_soups.errors import InputError
from personalized_soups.training.data import read_preferences, write_pairs

GOOD = {"prompt": "How?", "chosen": "So.", "rejected": "No."}
CHAT = {
    "prompt": [{"role": "user", "content": "How?"}],
    "chosen": [{"role": "assistant", "content": "So."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def test_both_formats_are_read_and_other_fields_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({**GOOD, "score": 1}).encode() + b"\r\n\n" + json.dumps(GOOD).encode()
    )
    plain = read_preferences(path)
    assert plain.pairs == (GOOD, GOOD)
    assert not plain.conversational
    assert plain.blake3 == blake3(path.read_bytes()).hexdigest()
    write_pairs(path, [CHAT])
    chat = read_preferences(path)
    assert chat.pairs == (CHAT,)
    assert chat.conversational


def test_of_a_message_only_role_and_text_count(tmp_path: Path) -> None:
    """Fields of several kinds under one name would break the table that TRL makes of the pairs."""
    path = tmp_path / "pairs.jsonl"
    odd = [{**CHAT, "chosen": [{**CHAT["chosen"][0], "name": name}]} for name in (1, "x")]
    write_pairs(path, odd)
    assert read_preferences(path).pairs == (CHAT, CHAT)


def test_text_beyond_ascii_survives_and_line_separators_of_unicode_do_not_split(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "Caf\u00e9?", "chosen": "a\u2028b", "rejected": "\u4f60\u597d"}
    write_pairs(path, [pair])
    assert read_preferences(path).pairs == (pair,)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"prompt": "How?", "chosen": "So."}, "'rejected' is missing"),
        ({"chosen": "So.", "rejected": "No."}, "'prompt' is missing"),
        ({**GOOD, "chosen": ""}, "`chosen` is empty"),
        ({**GOOD, "rejected": " \n"}, "`rejected` is empty"),
        ({**GOOD, "prompt": ""}, "`prompt` is empty"),
        ({**GOOD, "rejected": "So."}, "equal"),
        ({**GOOD, "chosen": None}, "`chosen` is null"),
        ({**GOOD, "chosen": 3}, "`chosen` is a number"),
        ({**GOOD, "chosen": CHAT["chosen"]}, "`chosen` is a list"),
        ({**CHAT, "chosen": "So."}, "`chosen` is text"),
        ({**CHAT, "rejected": []}, "`rejected` is empty"),
        ({**CHAT, "rejected": [{"role": "assistant"}]}, "without text"),
        ({**CHAT, "rejected": [{"role": "assistant", "content": " "}]}, "without text"),
        ({**CHAT, "rejected": ["No."]}, "without a role"),
        ({**CHAT, "rejected": CHAT["chosen"]}, "equal"),
        ({**CHAT, "rejected": [{**CHAT["chosen"][0], "name": "x"}]}, "equal"),
        ({**CHAT, "chosen": [{"role": "user", "content": "So."}]}, "role 'user'"),
        ({**GOOD, "chosen": "so \ud800"}, "surrogate"),
        ({**CHAT, "rejected": [{"role": "assistant", "content": "\udc00 so"}]}, "surrogate"),
        ({**GOOD, "prompt": None}, "`prompt` is null, expected text or a list"),
        ({**GOOD, "images": ["x.png"]}, "'images' is not taken"),
        ({**GOOD, "tools": [{}]}, "'tools' is not taken"),
        (["How?"], "found a list"),
        ("How?", "found text"),
    ],
)
def test_a_faulty_pair_is_named_with_its_line(tmp_path: Path, line: object, what: str) -> None:
    path = tmp_path / "pairs.jsonl"
    first = CHAT if isinstance(line, dict) and isinstance(line.get("prompt"), list) else GOOD
    path.write_text(json.dumps(first) + "\n\n" + json.dumps(line) + "\n")
    with pytest.raises(InputError) as caught:
        read_preferences(path)
    assert what in caught.value.what
    assert caught.value.where == f"{path}:3"
    assert caught.value.mend
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        (json.dumps(GOOD).encode() + b"\n" + '{"prompt": "caf\u00e9"}'.encode("latin1"), "not UTF-8", ":2"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-16, not UTF-8", ":1"),
        (json.dumps(GOOD).encode() + b"\n{'prompt'}\n", "not a JSON object", ":2"),
        (b'{"prompt": "x", "chosen"', "not a JSON object", ":1"),
        (b"[" * 100_000, "not a JSON object", ":1"),
        ((json.dumps(GOOD) + "\n" + json.dumps(CHAT)).encode(), "mixed", ":2"),
        (b"", "no pair", ""),
        (b"\n \n", "no pair", ""),
    ],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path: Path, content: bytes, what: str, where: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_preferences(path)
    assert what in caught.value.what
    assert caught.value.where == f"{path}{where}"


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="directory"):
        read_preferences(tmp_path)
