"""Pairs as token ids, compared with TRL's preparation and transformers' rendering."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import trl.data_utils
from transformers import AutoTokenizer
from trl.trainer.dpo_trainer import DPOTrainer

from personalized_soups.errors import InputError
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.training.data import read_preferences, write_pairs
from personalized_soups.training.encoding import EncodedPairs, check_pairs, encode_pairs

# Renders several keys of messages, as the templates of tool-calling models do.
TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message.name %}{{ message.name }}: {% endif %}"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]"
    "{% endfor %}{% if message.tool_call_id %} of {{ message.tool_call_id }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "kettle"}}}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}
# Templates that TRL ships for its tests; TRL added some of them after its first version.
SHIPPED = ["llama3", "llama3_1", "qwen2_5", "qwen3", "gemma", "gemma3", "glm4moe", "phi3", "deepseekv3", "cohere"]
WITH_TOOLS = ["llama3_1", "qwen2_5", "qwen3", "glm4moe"]


def _tokenizer(base: Path, template: str | None = None) -> Any:
    tokenizer = load_tokenizer(base)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _encoded(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 4096) -> EncodedPairs:
    write_pairs(folder / "pairs.jsonl", rows)
    return encode_pairs(read_preferences(folder / "pairs.jsonl"), tokenizer, max_length=max_length)


def _ids(encoded: EncodedPairs) -> list[tuple[list[int], list[int], list[int]]]:
    return [(list(pair.prompt_ids), list(pair.chosen_ids), list(pair.rejected_ids)) for pair in encoded.pairs]


def _ids_of_trl(rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 4096) -> list[tuple[list[int], ...]]:
    if not hasattr(trl.data_utils, "common_prefix_length"):
        pytest.skip("this TRL splits prompts and answers another way")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    config: Any = SimpleNamespace(max_length=max_length, truncation_mode="keep_start", dataset_num_proc=None)
    with quiet_transformers():
        found = DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, config, "train")
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in found]


def _chat(prompt: str = "wash the kettle?", chosen: Any = "rub it", rejected: Any = "then dry") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _shipped(name: str) -> str:
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this TRL has no {name}.jinja")
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [None, *SHIPPED])
def test_conversations_have_the_token_ids_of_trl(small_base: Path, tmp_path: Path, name: str | None) -> None:
    tokenizer = _tokenizer(small_base, None if name is None else _shipped(name))
    rows = [_chat(), _chat("why?", "so it looks nice again", "because of the soap and the clean towel")]
    rows[1]["prompt"] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes, hi"},
        *rows[1]["prompt"],
    ]
    assert _ids(_encoded(tmp_path, rows, tokenizer)) == _ids_of_trl(rows, tokenizer)


@pytest.mark.parametrize("name", [None, *WITH_TOOLS])
def test_tool_calls_reach_the_template_as_in_trl(small_base: Path, tmp_path: Path, name: str | None) -> None:
    tokenizer = _tokenizer(small_base, TOOLS_TEMPLATE if name is None else _shipped(name))
    row = {
        "prompt": [
            {"role": "user", "content": "where?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
            {"role": "tool", "content": "on the towel", "name": "look", "tool_call_id": "c1"},
        ],
        "chosen": [{"role": "assistant", "content": "Once more.", "tool_calls": [CALL]}],
        "rejected": [{"role": "assistant", "content": "Once more."}],
        "tools": [TOOL],
    }
    (found,) = _ids(_encoded(tmp_path, [row], tokenizer))
    messages: dict[str, Any] = {"chosen": row["chosen"], "rejected": row["rejected"]}
    for field, ids in zip(("chosen", "rejected"), found[1:], strict=True):
        whole = tokenizer.apply_chat_template(
            row["prompt"] + messages[field], tools=[TOOL], tokenize=True, return_dict=True
        )["input_ids"]
        assert found[0] + ids == whole
    assert tokenizer.decode(found[0]).count("kettle") == 1
    assert ["kettle" in tokenizer.decode(ids) for ids in found[1:]] == [True, False]


def test_a_call_alone_and_arguments_as_json_text_are_taken(small_base: Path, tmp_path: Path) -> None:
    """OpenAI writes arguments as text, which `tojson` would quote; a template that joins texts needs the text."""
    as_text = {"type": "function", "function": {"name": "look", "arguments": '{"at": "kettle"}'}}
    row = _chat()
    row["chosen"] = [{"role": "assistant", "content": None, "tool_calls": [as_text]}]
    tokenizer = _tokenizer(small_base, TOOLS_TEMPLATE)
    ((_, chosen, _),) = _ids(_encoded(tmp_path, [row], tokenizer))
    assert tokenizer.decode(chosen) == '[look {"at": "kettle"}]<|eos|>'
    joining = TOOLS_TEMPLATE.replace(" {{ call.function.arguments | tojson }}", "{{ ' ' + call.function.arguments }}")
    ((_, chosen, _),) = _ids(_encoded(tmp_path, [row], _tokenizer(small_base, joining)))
    assert tokenizer.decode(chosen) == '[look {"at": "kettle"}]<|eos|>'


def test_every_key_that_the_template_renders_reaches_it(small_base: Path, tmp_path: Path) -> None:
    """The template loops over all keys without naming them; a table would give every message null for missing keys."""
    whole = (
        "{% for message in messages %}<|{{ message.role }}|>"
        "{% for key, value in message.items() if key != 'role' and (value is string or value is mapping) %}"
        "{{ key }}={{ value }};{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = _tokenizer(small_base, whole)
    row = _chat()
    row["prompt"][0] |= {"name": "ann", "mood": {"glad": 1}, "tags": ["x"], "seen": None}
    row["chosen"][0] |= {"reasoning_content": "hm", "thinking": "so"}
    encoded = _encoded(tmp_path, [row], tokenizer)
    ((prompt, chosen, _),) = _ids(encoded)
    rendered = "content=wash the kettle?;name=ann;mood={'glad': 1};"
    assert tokenizer.decode(prompt) == f"<|user|>{rendered}<|eos|><|assistant|>"
    # transformers passes the reasoning under both names that templates use
    assert set(tokenizer.decode(chosen).split(";")) == {
        "content=rub it",
        "reasoning_content=hm",
        "thinking=so",
        "<|eos|>",
    }
    assert [note for note in encoded.notes(tokenizer, {1}) if "tags" in note]  # reported, because training loses it
    assert encoded.changes() == {"message_keys": ["mood", "name", "reasoning_content", "thinking"]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", [CALL]),
        ("function_call", {"name": "look"}),
        ("reasoning_content", "because"),
        ("reasoning", "because"),
        ("thinking", "because"),
        ("refusal", "no"),
    ],
)
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_what_was_said_and_the_template_does_not_render_is_refused_by_name(
    small_base: Path, tmp_path: Path, key: str, value: object, field: str
) -> None:
    row = _chat()
    row[field][-1] |= {key: value}
    mentioned = "{# no tool_calls, no message.reasoning: 'thinking' #}"
    tokenizer = _tokenizer(small_base)
    tokenizer.chat_template = mentioned + str(tokenizer.chat_template) + "{% if false %}some reasoning{% endif %}"
    with pytest.raises(InputError, match=f"'{key}'.*does not render.*lose this content") as caught:
        _encoded(tmp_path, [_chat("a"), row], tokenizer)
    assert caught.value.where == f"{tmp_path / 'pairs.jsonl'}:2"
    assert key in caught.value.mend


def test_reasoning_under_another_name_than_the_templates_is_rendered(small_base: Path, tmp_path: Path) -> None:
    row = _chat()
    row["chosen"][0]["reasoning"] = "hm"
    row["prompt"] += [{"role": "assistant", "content": "yes", "reasoning": "old"}, {"role": "user", "content": "so?"}]
    tokenizer = _tokenizer(small_base, _shipped("qwen3"))
    ((prompt, chosen, _),) = _ids(_encoded(tmp_path, [row], tokenizer))
    assert "<think>\nhm\n</think>" in tokenizer.decode(chosen)
    assert "old" not in tokenizer.decode(prompt)  # the template drops it in earlier turns


def test_tools_that_the_template_does_not_render_are_refused(small_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'tools'.*does not render") as caught:
        _encoded(tmp_path, [_chat(), {**_chat(), "tools": [TOOL]}], _tokenizer(small_base))
    assert caught.value.where.endswith(":2")


def test_plain_texts_have_the_token_ids_of_trl(small_base: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "wash: ", "chosen": "rub it", "rejected": "then dry it<|eos|>"},  # the space joins the next token
        {"prompt": "wash the", "chosen": " kettle", "rejected": " old towel again"},
    ]
    tokenizer = _tokenizer(small_base)
    assert _ids(_encoded(tmp_path, rows, tokenizer)) == _ids_of_trl(rows, tokenizer)[::-1]  # shorter ones first


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Human: wash? Assistant: rub it", "Human: wash? Assistant: rinse it"),
        ("Human: wash? Assistant: so", "Human: wash? Assistant: so it is"),
        ("Human: wash? Assistant: it", "Human: wash? Assistant:\nno"),
    ],
)
def test_an_implicit_prompt_of_texts_is_that_of_trl(
    small_base: Path, tmp_path: Path, chosen: str, rejected: str
) -> None:
    row: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
    write_pairs(tmp_path / "pairs.jsonl", [row])
    assert read_preferences(tmp_path / "pairs.jsonl").pairs == (trl.data_utils.extract_prompt(row),)
    tokenizer = _tokenizer(small_base)
    assert _ids(_encoded(tmp_path, [row], tokenizer)) == _ids_of_trl([row], tokenizer)


def test_an_implicit_prompt_of_conversations_is_that_of_trl(small_base: Path, tmp_path: Path) -> None:
    row = _chat()
    row = {field: [{"role": "system", "content": "be kind"}, *row["prompt"], *row[field]] for field in row}
    del row["prompt"]
    write_pairs(tmp_path / "pairs.jsonl", [row])
    assert read_preferences(tmp_path / "pairs.jsonl").pairs == (trl.data_utils.extract_prompt(row),)
    tokenizer = _tokenizer(small_base)
    assert _ids(_encoded(tmp_path, [row], tokenizer)) == _ids_of_trl([row], tokenizer)


def _words(first: str, num: int = 40) -> str:
    return f"{first} " + "soap and water " * num


def test_pairs_that_are_equal_once_cut_are_left_out_and_counted(small_base: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer(small_base)
    shared = _words("rub")
    rows = [
        _chat("a", shared + "so", shared + "dry"),  # equal once cut
        _chat("b", "rub it", _words("then")),  # one answer loses its end
        _chat("c", "rub", "dry"),
        _chat(_words("d"), "rub", "dry"),  # filled
        _chat("e", shared + "so", shared + "dry"),
    ]
    encoded = _encoded(tmp_path, rows, tokenizer, max_length=24)
    assert [pair.place.rpartition(":")[2] for pair in encoded.pairs] == ["3", "2"]
    every = _ids_of_trl(rows, tokenizer, max_length=24)
    assert _ids(encoded) == [every[2], every[1]]  # TRL itself keeps the two equal ones
    assert [(p + c)[:24] == (p + r)[:24] for p, c, r in every] == [True, False, False, True]
    notes = encoded.notes(tokenizer, {int(tokenizer.eos_token_id)})
    assert len(notes) == 3
    assert notes[0] == "1 pair is left out: the prompt alone fills dpo.max_length (24)"
    assert notes[1].startswith("2 pairs are left out: once cut to dpo.max_length (24) both answers are equal (")
    assert "pairs.jsonl:1)" in notes[1]
    assert notes[2] == "1 of 4 answers are longer than dpo.max_length (24) and lose their end"
    assert encoded.changes() == {"num_equal_pairs": 2}
    assert _encoded(tmp_path, rows[1:3], tokenizer, max_length=24).changes() == {}


def test_an_answer_as_long_as_the_limit_keeps_its_end(small_base: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer(small_base)
    (pair,) = _encoded(tmp_path, [_chat("a", "rub it so", "rub it dry")], tokenizer).pairs
    length = len(pair.prompt_ids + pair.chosen_ids)
    assert pair.num_cut(length) == len(pair.prompt_ids + pair.rejected_ids) - length == 0
    assert pair.num_cut(length - 1) == 2
    assert [list(ids) for ids in pair.cut(length)] == [
        list(pair.prompt_ids + pair.chosen_ids),
        list(pair.prompt_ids + pair.rejected_ids),
    ]


def test_nothing_but_equal_pairs_is_refused(small_base: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer(small_base)
    shared = _words("rub")
    with pytest.raises(InputError, match="no pair is left") as caught:
        _encoded(tmp_path, [_chat("a", shared + "so", shared + "dry")] * 2, tokenizer, max_length=24)
    assert "2 pairs have equal answers once cut to dpo.max_length (24 tokens)" in caught.value.what
    assert "max_length" in caught.value.mend
    trimming = "{% for message in messages %}<|{{ message.role }}|>{{ message.content | lower }}{% endfor %}"
    with pytest.raises(InputError, match="1 have equal answers before the cut") as caught:
        _encoded(tmp_path, [_chat("a", "Rub", "rub")], _tokenizer(small_base, trimming))
    assert "renders differently" in caught.value.mend
    one_left = _encoded(tmp_path, [_chat("a", "Rub", "rub"), _chat()], _tokenizer(small_base, trimming))
    assert any(
        note.startswith("1 pair is left out: both answers are the same") for note in one_left.notes(tokenizer, {1})
    )


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for message in %}", "can't be read"),
        ("{% include 'other' %}", "no loader"),
        ("{{ [].append.__globals__ }}", "unsafe"),
    ],
)
def test_a_template_that_raises_names_file_and_line(small_base: Path, tmp_path: Path, template: str, what: str) -> None:
    tokenizer = _tokenizer(small_base)
    guarded = "{% if messages[0].content == 'bad' %}" + template + "{% endif %}" + str(tokenizer.chat_template)
    tokenizer.chat_template = guarded if template.startswith("{{") else template
    bad = _chat("bad")
    good = [_chat("good")] if template.startswith("{{") else []
    with pytest.raises(InputError, match="chat template") as caught:
        _encoded(tmp_path, [*good, bad], tokenizer)
    assert what in caught.value.what
    assert caught.value.where == f"{tmp_path / 'pairs.jsonl'}:{len(good) + 1}"


def test_several_templates_without_a_default_are_told(small_base: Path, tmp_path: Path) -> None:
    template = _tokenizer(small_base).chat_template
    with pytest.raises(InputError, match="chat template") as caught:
        _encoded(tmp_path, [_chat()], _tokenizer(small_base, {"a": template, "b": template}))  # type: ignore[arg-type]
    assert caught.value.where.endswith("pairs.jsonl:1")


def test_a_token_that_the_base_has_no_embedding_for_names_file_and_line(small_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    size = len(tokenizer)
    tokenizer.add_tokens(["<kettle>"])
    for rows in ([_chat("b", "rub", "the <kettle>")], [{"prompt": "the <kettle>", "chosen": "a", "rejected": "b"}]):
        encoded = _encoded(tmp_path, rows, tokenizer)
        with pytest.raises(InputError, match=f"no token {size} \\('<kettle>'\\): it has {size}") as caught:
            check_pairs(encoded, tokenizer, size)
        assert caught.value.where == f"{tmp_path / 'pairs.jsonl'}:1"
        check_pairs(encoded, tokenizer, size + 1)
        check_pairs(encoded, tokenizer, None)
    cut = _encoded(tmp_path, [_chat("b", "rub", _words("dry") + "<kettle>")], tokenizer, max_length=20)
    check_pairs(cut, tokenizer, size)  # the cut removes the token


ENDLESS = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "num_endless"),
    [
        (ENDLESS, 2),
        (ENDLESS.replace("{% endfor %}", "{{ eos_token if message.role == 'user' }}{% endfor %}"), 2),
        (ENDLESS.replace("{% endfor %}", "<|pad|>{% endfor %}"), 2),  # another token than the end token
        (ENDLESS.replace("{% endfor %}", "{{ eos_token if message.content == 'rub' }}{% endfor %}"), 1),
        (ENDLESS.replace("{% endfor %}", "{{ eos_token }}\n{% endfor %}"), 0),
        (None, 0),
    ],
)
def test_an_answer_without_an_end_token_is_told(
    small_base: Path, tmp_path: Path, template: str | None, num_endless: int
) -> None:
    tokenizer = _tokenizer(small_base, template)
    rows = [_chat("a", "rub", "dry"), _chat("b", "rub it", "dry it")]
    notes = _encoded(tmp_path, rows, tokenizer).notes(tokenizer, {int(tokenizer.eos_token_id)})
    wanted = f"no end token ('<|eos|>') follows {num_endless} of 2 chosen answers in the chat template"
    assert [note.partition(":")[0] for note in notes] == ([wanted] if num_endless else [])


def test_every_token_at_which_generation_stops_is_an_end(small_base: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer(small_base, ENDLESS.replace("{% endfor %}", "<|pad|>{% endfor %}"))
    encoded = _encoded(tmp_path, [_chat()], tokenizer)
    pad, eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    assert encoded.notes(tokenizer, {eos, pad}) == []


def test_a_prompt_that_changes_once_an_answer_follows_is_told(small_base: Path, tmp_path: Path) -> None:
    """From there on, training would learn the user's words as the answer's."""
    num = "{{ messages | length }}"
    tokenizer = _tokenizer(small_base, num + str(_tokenizer(small_base).chat_template))
    encoded = _encoded(tmp_path, [_chat()], tokenizer)
    (note,) = encoded.notes(tokenizer, {int(tokenizer.eos_token_id)})
    assert note.startswith("1 pair is trained on a part of the prompt, too: the chat template")
    thinking = str(_tokenizer(small_base).chat_template).replace(
        "<|assistant|>{% endif %}", "<|assistant|>hm{% endif %}"
    )
    tokenizer = _tokenizer(small_base, thinking)  # only the text after the prompt changes
    assert _encoded(tmp_path, [_chat()], tokenizer).notes(tokenizer, {int(tokenizer.eos_token_id)}) == []


def test_the_file_holds_what_the_template_is_given(small_base: Path, tmp_path: Path) -> None:
    """Arguments differ between calls; a table would give every call the keys of all others."""
    rows = [_chat(f"{n}?") for n in range(2)]
    for n, row in enumerate(rows):
        call = {"type": "function", "function": {"name": "look", "arguments": {f"key{n}": n}}}
        row["chosen"][0]["tool_calls"] = [call]
    tokenizer = _tokenizer(small_base, TOOLS_TEMPLATE)
    texts = [tokenizer.decode(chosen) for _, chosen, _ in _ids(_encoded(tmp_path, rows, tokenizer))]
    assert sorted(texts) == [f"rub it[look {json.dumps({f'key{n}': n})}]<|eos|>" for n in range(2)]
