"""Prompts that begin alike are read once a soup, and never by another one's keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from personalized_soups import SoupModel
from personalized_soups.mixing.prefixes import PrefixCache
from tests.mixing.worlds import open_model, write_experts

CHAT = [{"role": "user", "content": "wash the old kettle with warm water and soap"}]


@pytest.fixture
def model(tmp_path: Path, small_base: Path) -> SoupModel:
    write_experts(tmp_path / "experts")
    return open_model(small_base, tmp_path / "experts")


def _asked(model: SoupModel, chat: Any, who: Any, prefixes: PrefixCache | None) -> tuple[str, list[int]]:
    """Return the answer, and how many tokens each forward pass read."""
    read: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _module, _arguments, keywords: read.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    text = "".join(model.stream(chat, who, max_new_tokens=5, prefixes=prefixes))
    handle.remove()
    return text, read


def test_a_chat_reads_only_what_is_new(model: SoupModel) -> None:
    prefixes = PrefixCache()
    first, read = _asked(model, CHAT, {"warm": 1.0}, prefixes)
    again = [*CHAT, {"role": "assistant", "content": first}, {"role": "user", "content": "rub it dry"}]
    want, whole = _asked(model, again, {"warm": 1.0}, None)
    got, rest = _asked(model, again, {"warm": 1.0}, prefixes)
    assert got == want
    # the chat's prompt ends with the template's word for the assistant, with which its next turn begins, too
    assert rest[0] == whole[0] - read[0]
    got, rest = _asked(model, again, {"warm": 1.0}, prefixes)
    assert (got, rest[0]) == (want, 1)  # the last token is always read: its logits choose the first one


def test_another_soup_never_sees_it(model: SoupModel, tmp_path: Path) -> None:
    prefixes = PrefixCache()
    _, read = _asked(model, CHAT, {"warm": 1.0}, prefixes)
    for who in ({"warm": 1.1}, {"cold": 1.0}, None, {"warm": {"*.mlp.*": 1.0}}):
        want, _ = _asked(model, CHAT, who, None)
        got, own = _asked(model, CHAT, who, prefixes)
        assert (got, own[0]) == (want, read[0])
    model.experts.add(tmp_path / "experts" / "warm")
    assert _asked(model, CHAT, {"warm": 1.0}, prefixes)[1][0] == read[0]


def test_a_schedule_leaves_the_prompt_alone(model: SoupModel) -> None:
    prefixes = PrefixCache()
    falling = {"warm": lambda step: 1.0 - 0.3 * step}
    want, whole = _asked(model, CHAT, falling, None)
    assert _asked(model, CHAT, falling, prefixes)[0] == want
    # the prompt was read with weight 1, as a steady profile of that weight reads it
    steady, _ = _asked(model, CHAT, {"warm": 1.0}, None)
    got, rest = _asked(model, CHAT, {"warm": 1.0}, prefixes)
    assert (got, rest[0]) == (steady, 1)
    assert whole[0] > 1


def _past(num_tokens: int) -> Any:
    from transformers import DynamicCache

    past = DynamicCache()
    past.update(torch.ones(1, 1, num_tokens, 4), torch.ones(1, 1, num_tokens, 4), 0)
    return past


def test_what_was_used_longest_ago_goes_first() -> None:
    prefixes = PrefixCache(max_bytes=2 * 2 * 3 * 4 * 4)  # two of three tokens
    prefixes.put("v", [1, 2, 3], _past(5))
    prefixes.put("v", [4, 5, 6], _past(3))
    assert prefixes.num_bytes == 192
    prefix = prefixes.longest("v", [1, 2, 9, 9])
    assert prefix is not None
    assert (prefix.num_tokens, prefix.past.get_seq_length()) == (2, 2)
    prefixes.put("v", [7, 8, 9], _past(3))
    assert prefixes.longest("v", [4, 5, 6, 0]) is None
    assert prefixes.longest("v", [1, 2, 3, 0]) is not None
    assert prefixes.longest("other", [1, 2, 3, 0]) is None
    prefixes.put("v", list(range(10)), _past(10))  # larger than all the room
    assert prefixes.num_bytes == 192
    prefixes.put("v", [7, 8, 9], _past(3))
    assert prefixes.num_bytes == 192
    # what is taken is the taker's own
    prefix.past.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)
    again = prefixes.longest("v", [1, 2, 3, 0])
    assert again is not None
    assert again.past.get_seq_length() == 3
