"""The folder of a user model: unknown users, one batch with soups, and files that are not what the record names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups import ExpertLibrary, Generator, SoupModel
from personalized_soups.errors import FileFormatError, IncompatibleExpertsError, InputError, SoupError
from personalized_soups.generation.generator import Within
from personalized_soups.mixing.personal_answers import answer
from personalized_soups.mixing.personal_model import PersonalModel
from personalized_soups.systems.p_rlhf.user_model import UserModel
from tests import oracles
from tests.experts import write_expert

PROMPT = "how to wash the kettle?"


def test_users_have_their_tokens_and_strangers_the_generic_ones(trained: Path) -> None:
    model = UserModel.open(trained)
    tables = oracles.read_tensors(trained / "user_model.safetensors")
    assert model.users == ("ada", "bob", "cleo \u00e9")
    for number, user in enumerate(model.users):
        want = tables["generic"].astype(np.float32) + tables["offsets"][number].astype(np.float32)
        assert np.array_equal(model.soft_tokens(user).numpy(), want)
    for stranger in (None, "nobody", "Ada", ""):
        assert np.array_equal(model.soft_tokens(stranger).numpy(), tables["generic"].astype(np.float32))
    personal = model.personal_model("bob", text="I am new.")
    assert (personal.adapter, personal.text) == (trained, "I am new.")
    assert personal.soft_tokens is not None
    assert torch.equal(personal.soft_tokens, model.soft_tokens("bob"))


def test_users_and_soups_share_a_batch(trained: Path, small_base: Path, tmp_path: Path) -> None:
    write_expert(tmp_path / "experts" / "warm", seed=3)
    model = SoupModel.from_pretrained(small_base, tmp_path / "experts", device="cpu", same_base=True)
    users = UserModel.open(trained)
    users.check_base(model)
    rows = [
        users.personal_model("ada"),
        users.personal_model("bob", profile={"warm": 0.5}),
        PersonalModel(profile={"warm": 0.5}),
        users.personal_model("stranger"),
        PersonalModel(),
    ]
    together = answer(model, [PROMPT] * 5, rows, max_new_tokens=10)
    assert together == [answer(model, [PROMPT], row, max_new_tokens=10)[0] for row in rows]
    assert len(set(together)) == 5
    # the oracle: PEFT's own adapter, with the same soft tokens
    generator = Generator.open(small_base, trained, device="cpu", fold=False)
    soft = users.soft_tokens("ada")

    class Around:
        def __enter__(self) -> Within:
            return Within(soft_tokens=[soft])

        def __exit__(self, *_: object) -> None:
            return None

    ((alone,),) = generator.answers([PROMPT], greedy=True, max_new_tokens=10, around=lambda _: Around())
    assert together[0] == alone


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "user_model.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        change(record)
        path.write_text(json.dumps(record), encoding="utf-8")

    return edit


def _rewrite(**tables: Any) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "user_model.safetensors"
        old = oracles.read_tensors(path)
        new = {name: old[name] * tables.get(name, 1.0) for name in old}
        path.unlink()
        oracles.write_tensors(path, {name: ("F32", values) for name, values in new.items()})
        if "digest" in tables:
            from blake3 import blake3

            digest = blake3(path.read_bytes()).hexdigest()
            _edit(lambda record: record.update(blake3=digest))(folder)

    return rewrite


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (_edit(lambda record: record.update(users=["ada", "bob", "ada"])), "'ada' is named twice"),
        (_edit(lambda record: record.update(users=["ada", "bob", " "])), "users.2"),
        (_edit(lambda record: record.update(kind="personal")), "user_model.json: kind"),
        (_edit(lambda record: record.update(users=["ada"])), "the tables have the shapes"),
        (_edit(lambda record: record.update(width=65)), "the tables have the shapes"),
        (_edit(lambda record: record.update(num_clusters=2)), "`num_clusters` is for the kind `cluster`"),
        (_edit(lambda record: record.update(format_version=2)), "user_model.json: format_version"),
        (_edit(lambda record: record.update(colour="red")), "user_model.json: colour"),
        (lambda folder: (folder / "user_model.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "user_model.safetensors").unlink(), "user_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (_rewrite(generic=2.0), "its digest differs"),
        (_rewrite(generic=np.inf, digest=True), "the table generic has a value that is not a finite number"),
    ],
)
def test_damaged_user_models_are_refused(
    trained: Path, tmp_path: Path, damage: Callable[[Path], object], what: str
) -> None:
    shutil.copytree(trained, tmp_path / "people")
    damage(tmp_path / "people")
    with pytest.raises((FileFormatError, InputError)) as caught:
        UserModel.open(tmp_path / "people")
    assert what in str(caught.value)
    assert caught.value.where.startswith(str(tmp_path / "people"))
    assert caught.value.mend


def test_a_base_of_another_width_is_refused(trained: Path, small_base: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(small_base)
    config.hidden_size, config.num_hidden_layers = 32, 1
    users = UserModel.open(trained)
    with pytest.raises(IncompatibleExpertsError, match="width 64, but the base's embeddings have the width 32"):
        users.check_base(AutoModelForCausalLM.from_config(config))
    copied = tmp_path / "base"
    shutil.copytree(small_base, copied)
    config_file = copied / "generation_config.json"
    config_file.unlink(missing_ok=True)
    users.check_base(SoupModel.from_pretrained(copied, ExpertLibrary.open(), device="cpu"))
    with pytest.raises(SoupError):
        UserModel.open(tmp_path / "nowhere")
