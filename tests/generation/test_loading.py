"""A base is found in a folder, in the local cache, or on the hub. The hub is a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.errors import IncompatibleExpertsError, InputError
from personalized_soups.generation.base_location import find_base
from personalized_soups.generation.generator import Generator
from personalized_soups.mixing.model import SoupModel
from tests.experts import write_expert
from tests.hub import MODEL, Hub, used_hub


@pytest.fixture
def hub(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with used_hub(small_base, tmp_path / "cache", monkeypatch) as hub:
        yield hub


def test_a_soup_model_asks_the_hub_once(hub: Hub, tmp_path: Path) -> None:
    write_expert(tmp_path / "experts" / "one")
    hub.way = "closes"
    with pytest.raises(InputError, match=r"no such folder.*hub can't be reached") as caught:
        SoupModel.from_pretrained("nofolder", tmp_path / "experts", device="cpu")
    assert caught.value.where == "nofolder"
    assert "model folder" in caught.value.mend
    assert f"a machine that can reach {hub.address}/nofolder" in caught.value.mend
    assert hub.asked_for_model == ["HEAD /nofolder/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("answer", "what", "mend"),
    [
        ((404, "RepoNotFound"), "the hub has no model of this name that you may read", "hf auth login"),
        ((401, "RepoNotFound"), "the hub has no model of this name that you may read", "hf auth login"),
        ((403, "GatedRepo"), "accepted its conditions", "/owner/other, then run: hf auth login"),
        ((404, "EntryNotFound"), "no config.json", "owner/name"),
        ((429, ""), "the hub refuses the model: 429", "check the path"),
    ],
)
def test_the_hubs_answer_is_reported(hub: Hub, answer: tuple[int, str], what: str, mend: str) -> None:
    hub.way, hub.refusal = "refuses", answer
    with pytest.raises(InputError) as caught:
        find_base("owner/other")
    assert what in caught.value.what
    assert mend in caught.value.mend
    assert len(hub.asked_for_model) == 1


def test_a_model_in_the_cache_is_loaded_where_the_hub_does_not_answer(hub: Hub) -> None:
    from_hub = Generator.open(MODEL, device="cpu").answers(["wash"], max_new_tokens=4, greedy=True)
    assert f"GET /{MODEL}/resolve/main/model.safetensors" in hub.requests
    for way in ("closes", "hangs"):
        hub.way = way
        hub.requests.clear()
        assert Generator.open(MODEL, device="cpu").answers(["wash"], max_new_tokens=4, greedy=True) == from_hub
        assert hub.asked_for_model == [f"HEAD /{MODEL}/resolve/main/config.json"] * 2  # for the tokenizer, the model


@pytest.mark.slow
def test_experts_that_record_a_base_are_held_against_the_hubs(hub: Hub, small_base: Path, tmp_path: Path) -> None:
    """A model of the hub has a fingerprint only after its download."""
    own, other = (write_expert(tmp_path / name / "warm", seed=1) for name in ("own", "other"))
    for folder, fingerprint in ((own, base_fingerprint(small_base)), (other, "ab" * 32)):
        record = {"side": "warm", "base": {"name": "b", "fingerprint": fingerprint}}
        (folder / "expert.json").write_text(json.dumps(record))
    assert list(SoupModel.from_pretrained(MODEL, own.parent, device="cpu").experts) == ["warm"]
    assert any(request.startswith("GET ") and request.endswith("/model.safetensors") for request in hub.requests)
    with pytest.raises(IncompatibleExpertsError, match="warm was trained on"):
        SoupModel.from_pretrained(MODEL, other.parent, device="cpu")


def test_a_folder_of_that_name_comes_first(
    hub: Hub, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").symlink_to(small_base)
    monkeypatch.chdir(tmp_path)
    Generator.open(MODEL, device="cpu")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "options"), [("HF_HUB_OFFLINE", {}), ("local_files_only", {"local_files_only": True})]
)
def test_the_hub_is_not_asked_where_that_is_forbidden(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", name == "HF_HUB_OFFLINE")
    with pytest.raises(InputError, match=f"{name} keeps this run from the Hugging Face hub") as caught:
        find_base("nofolder", **options)
    assert "hf download nofolder" in caught.value.mend
    assert hub.requests == []


@pytest.mark.parametrize("name", ["no folder", "a..b", "x" * 300, ""])
def test_a_name_that_is_not_a_hub_id_is_not_sent(hub: Hub, name: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find_base(name)
    assert hub.requests == []
