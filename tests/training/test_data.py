from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def test_further_keys_of_a_message_are_kept_and_empty_ones_dropped(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    empty: dict[str, Any] = {
        "tool_calls": None,
        "name": None,
        "refusal": None,
        "audio": None,
        "annotations": [],
        "reasoning": "",
    }
    odd = [{**CHAT, "chosen": [{**CHAT["chosen"][0], **empty, "name": name}]} for name in (1, "x", None)]
    write_pairs(path, odd)
    found = [pair["chosen"][0] for pair in read_preferences(path).pairs]
    assert found == [{**CHAT["chosen"][0], "name": 1}, {**CHAT["chosen"][0], "name": "x"}, CHAT["chosen"][0]]


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    parts = [{"type": "text", "text": "So"}, {"type": "text", "text": ".", "image": None}]
    write_pairs(path, [{**CHAT, "chosen": [{"role": "assistant", "content": parts}]}])
    assert read_preferences(path).pairs == (CHAT,)


SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [*CHAT["prompt"], {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "The big one."}]
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize("shared", [CHAT["prompt"], [SYSTEM, *CHAT["prompt"]], TURNS])
@pytest.mark.parametrize("prompt", ["implicit", "repeated", "text"])
def test_a_prompt_within_both_conversations_is_taken_out(
    tmp_path: Path, shared: list[dict[str, str]], prompt: str
) -> None:
    """`prompt` may be missing, repeat the shared messages, or hold the last one as text (ultrafeedback_binarized)."""
    path = tmp_path / "pairs.jsonl"
    row = {field: shared + CHAT[field] for field in ("chosen", "rejected")}
    given: dict[str, Any] = {"repeated": shared, "text": shared[-1]["content"]}
    named = {"prompt": given[prompt]} if prompt in given else {}
    write_pairs(path, [{**row, **named, "messages": row["chosen"], "score_chosen": 8.0}])
    assert read_preferences(path).pairs == ({**CHAT, "prompt": shared},)


def test_a_call_needs_no_text_and_tools_may_be_json(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    tools = [{"type": "function", "function": {"name": "look"}}]
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    rows: list[dict[str, Any]] = [{**CHAT, "chosen": [{**called, "content": content}]} for content in ("", None)]
    del rows[1]["chosen"][0]["content"]
    write_pairs(path, [{**rows[0], "tools": tools}, {**rows[1], "tools": json.dumps(tools)}, {**rows[0], "tools": []}])
    pairs = read_preferences(path).pairs
    assert pairs == ({**rows[0], "tools": tools}, {**rows[0], "tools": tools}, rows[0])


def test_pairs_keep_the_numbers_of_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"\n{json.dumps(GOOD)}\n\n\n{json.dumps(GOOD)}\n")
    found = read_preferences(path)
    assert [found.place(index) for index in (0, 1)] == [f"{path}:2", f"{path}:5"]


def _says(*roles: str, **keys: object) -> list[dict[str, object]]:
    return [{"role": role, "content": f"{role}'s"} | (keys if number else {}) for number, role in enumerate(roles)]


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
        ({**CHAT, "chosen": _says("assistant", "user")}, "`chosen` has a message of the role 'user' (message 2)"),
        ({**CHAT, "chosen": _says("assistant", "user", "assistant")}, "`chosen` has a message of the role 'user'"),
        ({**CHAT, "rejected": _says("assistant", "tool", "assistant")}, "`rejected` has a message of the role 'tool'"),
        ({**CHAT, "rejected": _says("assistant", "system")}, "`rejected` has a message of the role 'system'"),
        ({**CHAT, "chosen": _says("assistant", "assistant", weight=0)}, "'weight': 0 (message 2)"),
        ({**CHAT, "chosen": _says("assistant", "assistant", train=False)}, "'train': false (message 2)"),
        ({**CHAT, "chosen": [{**CHAT["chosen"][0], "images": ["x.png"]}]}, "'images'"),
        ({**CHAT, "chosen": [{**CHAT["chosen"][0], "tool_calls": "look"}]}, "tool call without a function's name"),
        ({**CHAT, "chosen": [{**CHAT["chosen"][0], "tool_calls": [{"name": ""}]}]}, "tool call without"),
        ({**CHAT, "chosen": [{"role": "assistant", "content": [{"type": "image_url"}]}]}, "part that is not text"),
        ({**CHAT, "chosen": [{"role": "assistant", "content": ["So."]}]}, "part that is not text"),
        ({**CHAT, "chosen": [{"role": "assistant", "content": 3}]}, "without text"),
        ({**CHAT, "tools": "look"}, "`tools` is not a list"),
        ({"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}, "no common first message"),
        ({"chosen": TURNS[:2], "rejected": [*TURNS[:1], *CHAT["prompt"]]}, "begins with a message of the role 'user'"),
        ({"chosen": CHAT["chosen"], "rejected": "No."}, "'prompt' is missing"),
        ({"chosen": "The cat", "rejected": "The dog", "question": "Which?"}, "'prompt' is missing ('question' may be"),
        ({"chosen": " So.", "rejected": " No."}, "no common start"),
        ({**CHAT, "prompt": "How?"}, "`chosen` is a list of messages, but `prompt` is text"),
        (
            {"prompt": "Why?", **{f: CHAT["prompt"] + CHAT[f] for f in ("chosen", "rejected")}},
            "`prompt` is text and differs",
        ),
        ({**GOOD, "chosen": "so \ud800"}, "surrogate"),
        ({**CHAT, "rejected": [{"role": "assistant", "content": "\udc00 so"}]}, "surrogate"),
        ({**GOOD, "prompt": None}, "`prompt` is null, but must be text or a list"),
        ({**GOOD, "images": ["x.png"]}, "'images' is not supported"),
        ({**GOOD, "tools": [{}]}, "'tools' is not supported"),
        (["How?"], "found a list"),
        ("How?", "found text"),
    ],
)
def test_a_faulty_pair_is_named_with_its_line(tmp_path: Path, line: object, what: str) -> None:
    path = tmp_path / "pairs.jsonl"
    first = CHAT if isinstance(line, dict) and isinstance(line.get("chosen"), list) else GOOD
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
        ((json.dumps(GOOD) + "\n" + json.dumps(CHAT)).encode(), "mixes", ":2"),
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
