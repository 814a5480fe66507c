from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from personalized_soups import ExpertLibrary
from personalized_soups.adapters.provenance import read_expert_record
from personalized_soups.declare.training import TrainingRecipe, UsersRecipe
from personalized_soups.errors import DeclarationError, InputError, OutputExistsError, UsageError
from personalized_soups.systems.p_rlhf.training import train_user_model
from personalized_soups.systems.p_rlhf.user_model import UserModel
from personalized_soups.training import checkpoints
from personalized_soups.training.data import read_preferences
from tests.training.heard import Heard


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_an_adapter_with_its_record_and_the_user_model(
    trained: Path, small_base: Path, recipe: TrainingRecipe
) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors", "expert.json"]
    assert sorted(_bytes(trained)) == [*names, "user_model.json", "user_model.safetensors"]
    assert sorted(path.name for path in trained.parent.iterdir()) == ["people"]  # no checkpoint is left
    record = read_expert_record(trained)
    assert record is not None
    assert (record.side, record.dimension) == (None, None)
    assert sorted(record.files) == sorted(set(_bytes(trained)) - {"expert.json"})
    assert record.recipe["users"] == recipe.users.model_dump(mode="json")  # type: ignore[union-attr]
    assert record.metrics["num_steps"] == 8
    assert ExpertLibrary.open(trained)["people"].side is None
    assert all("lora_" in name for name in load_file(trained / "adapter_model.safetensors"))
    written = json.loads((trained / "user_model.json").read_text(encoding="utf-8"))
    assert written["users"] == ["ada", "bob", "cleo \u00e9"]
    assert (written["kind"], written["num_tokens"], written["width"]) == ("individual", 3, 64)
    assert written["base"] == record.base.model_dump()
    modes = {path.stat().st_mode & 0o777 for path in trained.iterdir()}
    assert len(modes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["individual", "cluster"])
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path, kind: str
) -> None:
    recipe = recipe.replaced(users=recipe.users.replaced(model=kind))  # type: ignore[union-attr]
    whole, parts = tmp_path / "whole" / "people", tmp_path / "parts" / "people"

    def train(out: Path, progress: Heard, *, resume: bool = False) -> Path:
        return train_user_model(
            base=small_base, data=pairs_file, out=out, recipe=recipe, device="cpu", resume=resume, progress=progress
        )

    torch.manual_seed(5)  # the caller's random state must not matter
    train(whole, Heard())
    with pytest.raises(KeyboardInterrupt):
        train(parts, Heard(stop_at=5))  # in the second epoch; the last checkpoint has 3 steps
    assert not parts.exists()
    with pytest.raises(OutputExistsError, match="interrupted training"):
        train(parts, Heard())
    resumed = Heard()
    train(parts, resumed, resume=True)
    assert resumed.begun == [3]
    assert [report.step for report in resumed.reports] == [4, 5, 6, 7, 8]
    assert _bytes(parts) == _bytes(whole)
    again = Heard()
    train(parts, again, resume=True)
    assert again.begun == []
    assert "already" in again.notes[0]
    with pytest.raises(OutputExistsError):
        train_user_model(base=small_base, data=pairs_file, out=parts, recipe=recipe, device="cpu", resume=True, seed=1)


def test_checkpoints_of_another_number_of_soft_tokens_are_not_resumed(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"base": small_base, "data": pairs_file, "out": tmp_path / "people", "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        train_user_model(**options, recipe=recipe, progress=Heard(stop_at=4))
    other = recipe.replaced(users=recipe.users.replaced(tokens=5))  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="recipe was"):
        train_user_model(**options, recipe=other, resume=True)
    assert checkpoints.last_complete(checkpoints.partial_folder(tmp_path / "people")) is not None


def test_tables_learn_at_their_own_rate_and_rows_without_pairs_stay(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    one = recipe.replaced(optimizer=recipe.optimizer.replaced(epochs=None, max_steps=1, warmup_steps=0, batch_size=1))
    moved = {}
    for factor in (10.0, 1.0):
        users = one.users.replaced(learning_rate_factor=factor)  # type: ignore[union-attr]
        out = train_user_model(
            base=small_base, data=pairs_file, out=tmp_path / f"{factor}", recipe=one.replaced(users=users), device="cpu"
        )
        moved[factor] = load_file(out / "user_model.safetensors")
    still = one.replaced(users=one.users.replaced(learning_rate_factor=1e-30))  # type: ignore[union-attr]
    out = train_user_model(base=small_base, data=pairs_file, out=tmp_path / "still", recipe=still, device="cpu")
    before = load_file(out / "user_model.safetensors")
    changes = {factor: {name: table - before[name] for name, table in moved[factor].items()} for factor in moved}
    # Adam's first step is the learning rate times the gradient's sign. Adding it rounds to half a unit in the last
    # place of the table's values, which are below 1/4.
    for factor, rate in ((10.0, 0.05), (1.0, 0.005)):
        changed = changes[factor]["generic"].abs()
        assert float((changed - rate).abs().median()) < 2**-26 + 1e-3 * rate
    # one pair of one user: the other users' rows keep their initial values
    assert sorted(bool(rows.any()) for rows in changes[10.0]["offsets"]) in ([False] * 3, [False, False, True])


def test_the_uninformative_model_has_one_row_for_all(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    users = UsersRecipe(model="uninformative", tokens=2)
    short = recipe.replaced(users=users, optimizer=recipe.optimizer.replaced(epochs=None, max_steps=2))
    out = train_user_model(base=small_base, data=pairs_file, out=tmp_path / "all", recipe=short, device="cpu")
    model = UserModel.open(out)
    assert model.users == ()
    assert torch.equal(model.soft_tokens("ada"), model.soft_tokens(None))
    assert list(load_file(out / "user_model.safetensors")) == ["generic"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"user": ""}, "`user` is empty"),
        ({"user": " "}, "`user` is empty"),
        ({"user": 7}, "`user` must be a string, but it is 7"),
        ({"user_text": ""}, "`user_text` is empty"),
        ({"user_text": ["a"]}, "`user_text` must be a string"),
    ],
)
def test_wrong_users_name_file_and_line(
    small_base: Path, recipe: TrainingRecipe, tmp_path: Path, line: dict[str, Any], what: str
) -> None:
    data = tmp_path / "pairs.jsonl"
    good = {"prompt": "wash", "chosen": "rub it", "rejected": "soap"}
    data.write_text(json.dumps(good | {"user": "ada"}) + "\n" + json.dumps(good | line) + "\n")
    with pytest.raises(InputError, match=what) as caught:
        train_user_model(base=small_base, data=data, out=tmp_path / "x", recipe=recipe, device="cpu")
    assert caught.value.where == f"{data}:2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl"]
    assert len(read_preferences(data).pairs) == 2  # an expert's training ignores these fields


def test_pairs_of_nobody_teach_no_user_model(small_base: Path, recipe: TrainingRecipe, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "wash", "chosen": "rub it", "rejected": "soap"}) + "\n")
    with pytest.raises(InputError, match="no pair names its user"):
        train_user_model(base=small_base, data=data, out=tmp_path / "x", recipe=recipe, device="cpu")


def test_soft_tokens_beyond_the_bases_positions_are_refused(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    many = recipe.replaced(users=UsersRecipe(tokens=250))
    with pytest.raises(DeclarationError, match="250 soft tokens come before it, but the base takes at most 256"):
        train_user_model(base=small_base, data=pairs_file, out=tmp_path / "x", recipe=many, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_text_of_a_user_is_put_before_the_prompt(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    chat = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "wash"}],
        "chosen": [{"role": "assistant", "content": "rub"}],
        "rejected": [{"role": "assistant", "content": "soap"}],
    }
    data.write_text(json.dumps(chat | {"user_text": "I am new."}) + "\n" + json.dumps(chat | {"user": "ada"}) + "\n")
    first, second = read_preferences(data, with_users=True).pairs
    assert [message["content"] for message in first["prompt"]] == ["s", "I am new.\n\nwash"]
    assert "user" not in first
    assert (second["prompt"], second["user"]) == (chat["prompt"], "ada")
    plain = {"prompt": "wash", "chosen": "rub", "rejected": "soap", "user_text": "I am new."}
    data.write_text(json.dumps(plain) + "\n")
    assert read_preferences(data, with_users=True).pairs[0]["prompt"] == "I am new.\n\nwash"


def test_unfinished_folders_are_not_opened(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "people")
    (tmp_path / "people" / "user_model.json").unlink()
    with pytest.raises(InputError, match="holds no user model"):
        UserModel.open(tmp_path / "people")
