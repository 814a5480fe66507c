from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.provenance import read_expert_record
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import DeclarationError, InputError, OutputExistsError, RunError, SoupError, UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.merging.writing.adapter import merge
from personalized_soups.training import checkpoints
from personalized_soups.training.expert import train_expert
from personalized_soups.training.progress import StepReport
from personalized_soups.training.shared_basis import basis_factor, core_factors
from tests.training.heard import Heard

CATALOGUE = Catalogue.model_validate_json(
    """{"dimensions": {"informativeness": {"about": "length", "sides": {
        "concise": {"label": "P2A", "instruction": "Be brief.", "end": "low"}}}}}"""
)


@pytest.fixture(scope="module")
def expert(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("experts") / "concise"
    return train_expert(
        "concise", base=small_base, data=pairs_file, out=out, recipe=recipe, catalogue=CATALOGUE, device="cpu"
    )


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_expert_is_a_plain_adapter_folder_with_its_record(
    expert: Path, small_base: Path, pairs_file: Path, recipe: TrainingRecipe
) -> None:
    assert sorted(_bytes(expert)) == ["adapter_config.json", "adapter_model.safetensors", "expert.json"]
    assert sorted(path.name for path in expert.parent.iterdir()) == ["concise"]  # no checkpoint is left
    config = json.loads((expert / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    assert config["base_model_name_or_path"] == str(small_base)
    record = read_expert_record(expert)
    assert record is not None
    assert (record.side, record.dimension, record.basis, record.seed) == ("concise", "informativeness", "free", 0)
    assert record.base.fingerprint == base_fingerprint(small_base)
    assert record.data is not None
    assert record.data.num_pairs == 19
    assert record.recipe["optimizer"]["learning_rate"] == 0.01  # the side's own
    assert record.metrics["num_steps"] == 10
    assert record.metrics["margin"] > 0
    assert set(record.versions) >= {"torch", "transformers", "peft", "trl", "personalized_soups"}


def test_training_makes_chosen_answers_likelier_against_rejected_ones(
    expert: Path, small_base: Path, pairs_file: Path
) -> None:
    pairs = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    base = Generator.open(small_base, device="cpu").model
    trained = Generator.open(small_base, expert, device="cpu").model
    tokenizer = load_tokenizer(small_base)

    nothing: list[dict[str, str]] = []

    def log_prob(model: Any, pair: dict[str, Any], field: str) -> float:
        texts = [
            tokenizer.apply_chat_template(pair["prompt"] + rest, tokenize=False, add_generation_prompt=not rest)
            for rest in (nothing, pair[field])
        ]
        before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0]
        log_probs = torch.log_softmax(logits[:-1], -1)[torch.arange(len(whole) - 1), torch.tensor(whole[1:])]
        return float(log_probs[len(before) - 1 :].sum())

    margins = [
        (log_prob(trained, pair, "chosen") - log_prob(base, pair, "chosen"))
        - (log_prob(trained, pair, "rejected") - log_prob(base, pair, "rejected"))
        for pair in pairs
    ]
    assert sum(margin > 0 for margin in margins) >= 17


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    expert: Path, small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    torch.manual_seed(123)  # the caller's random state must not matter
    for seed in (0, 1):
        train_expert(
            "concise",
            base=small_base,
            data=pairs_file,
            out=tmp_path / str(seed),
            recipe=recipe,
            catalogue=CATALOGUE,
            device="cpu",
            seed=seed,
        )
    assert _bytes(tmp_path / "0") == _bytes(expert)
    assert _bytes(tmp_path / "1")["adapter_model.safetensors"] != _bytes(expert)["adapter_model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["free", "shared", "core"])
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path, basis: str
) -> None:
    recipe = recipe.replaced(basis=basis)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def train(out: Path, progress: Heard, *, resume: bool = False) -> Path:
        return train_expert(
            "x",
            base=small_base,
            data=pairs_file,
            out=out,
            recipe=recipe,
            device="cpu",
            resume=resume,
            progress=progress,
        )

    train(whole, Heard())
    heard = Heard(stop_at=8)  # in the second epoch; the last checkpoint has 6 steps
    with pytest.raises(KeyboardInterrupt):
        train(parts, heard)
    assert not parts.exists()
    with pytest.raises(OutputExistsError, match="interrupted training"):
        train(parts, Heard())
    shutil.copytree(
        checkpoints.partial_folder(parts) / "checkpoint-6", checkpoints.partial_folder(parts) / "checkpoint-9"
    )
    incomplete = checkpoints.partial_folder(parts) / "checkpoint-9" / "optimizer.pt"
    incomplete.write_bytes(b"cut")  # as after a kill
    resumed = Heard()
    train(parts, resumed, resume=True)
    assert resumed.begun == [6]
    assert [report.step for report in resumed.reports] == [7, 8, 9, 10]
    assert _bytes(parts) == _bytes(whole)
    checkpoints.partial_folder(parts).mkdir()  # as after a kill right after the last rename
    again = Heard()
    train(parts, again, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    assert again.begun == []
    assert "already" in again.notes[0]


def test_a_training_stopped_before_its_first_checkpoint_leaves_nothing(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_expert(
            "x",
            base=small_base,
            data=pairs_file,
            out=tmp_path / "deep" / "x",
            recipe=recipe,
            device="cpu",
            progress=Heard(stop_at=2),
        )
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not checkpoints.partial_folder(tmp_path / "deep" / "x").exists()


def test_experts_of_one_basis_seed_share_a_and_train_b(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    shared = recipe.replaced(basis="shared", basis_seed=5)
    tensors = []
    for seed, side in enumerate(("concise", "other")):
        out = train_expert(
            side, base=small_base, data=pairs_file, out=tmp_path / side, recipe=shared, device="cpu", seed=seed
        )
        tensors.append(load_file(out / "adapter_model.safetensors"))
    first, second = tensors
    factors = [name for name in first if ".lora_A." in name]
    assert len(factors) == 14  # seven linear layers in each of two blocks
    for name in factors:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, in_features = first[name].shape
        assert torch.equal(first[name], basis_factor(module, rank, in_features, seed=5))
        assert torch.equal(first[name], second[name])
        b_name = name.replace("lora_A", "lora_B")
        assert first[b_name].abs().max() > 0
        assert not torch.equal(first[b_name], second[b_name])


def test_experts_of_one_core_basis_differ_in_a_core_and_merge_at_the_rank_of_one(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    declared = recipe.replaced(basis="core", basis_seed=5)
    folders = [
        train_expert(
            side, base=small_base, data=pairs_file, out=tmp_path / side, recipe=declared, device="cpu", seed=seed
        )
        for seed, side in enumerate(("concise", "other"))
    ]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert {name.split(".lora_")[1] for name in first} == {"A.weight", "B.weight"}  # an ordinary adapter of PEFT
    profile = Profile(weights={"concise": 0.7, "other": 0.4})
    soup = merge(ExpertLibrary.open(*folders), profile).write(tmp_path / "soup")
    merged, config = (
        load_file(soup / "adapter_model.safetensors"),
        json.loads((soup / "adapter_config.json").read_text()),
    )
    scaling = (recipe.lora.alpha / recipe.lora.rank) / (config["lora_alpha"] / config["r"])
    for name in (name for name in first if ".lora_A." in name):
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        other = name.replace("lora_A", "lora_B")
        rank, in_features = first[name].shape
        a_RI, b_OR = core_factors(module, rank, in_features, first[other].shape[0], seed=5)
        cores = []
        for tensors in (first, second):
            assert torch.equal(tensors[name], a_RI)
            core_RR = torch.linalg.lstsq(b_OR.double(), tensors[other].double()).solution
            # B is the basis times a core, up to the rounding of float32
            assert (b_OR.double() @ core_RR - tensors[other]).abs().max() < 1e-6 * tensors[other].abs().max()
            cores.append(core_RR)
        assert cores[0].abs().max() > 0
        assert (cores[0] - cores[1]).abs().max() > 0
        assert merged[name].shape == (rank, in_features)  # the soup has the rank of one expert
        mixed_RR = 0.7 * cores[0] + 0.4 * cores[1]
        delta_OI = merged[other].double() @ merged[name].double()
        expected_OI = scaling * b_OR.double() @ mixed_RR @ a_RI.double()
        assert (delta_OI - expected_OI).abs().max() < 1e-5 * expected_OI.abs().max()


def test_every_step_is_reported(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = Heard()
    capfd.readouterr()
    train_expert("x", base=small_base, data=pairs_file, out=tmp_path / "x", recipe=recipe, device="cpu", progress=heard)
    assert [report.step for report in heard.reports] == list(range(1, 11))
    assert {report.num_steps for report in heard.reports} == {10}
    assert heard.reports[0].figures["margin"] == pytest.approx(0.0, abs=1e-5)  # the expert begins as the base
    assert heard.reports[-1].figures["margin"] > 0
    assert all(0 <= report.figures["accuracy"] <= 1 and math.isfinite(report.loss) for report in heard.reports)
    assert heard.ended == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_modes_follow_the_umask(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path, umask_022: None
) -> None:
    one_step = recipe.replaced(optimizer=recipe.optimizer.replaced(epochs=None, max_steps=1))
    out = train_expert("x", base=small_base, data=pairs_file, out=tmp_path / "x", recipe=one_step, device="cpu")
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == {
        name: 0o644 for name in ("adapter_config.json", "adapter_model.safetensors", "expert.json")
    }


def test_input_at_fault_is_said_before_anything_is_written(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "x"
    with pytest.raises(DeclarationError) as caught:
        train_expert("concice", base=small_base, data=pairs_file, out=out, recipe=recipe, catalogue=CATALOGUE)
    assert "concise" in caught.value.mend
    with pytest.raises(InputError, match="no such folder"):
        train_expert("concise", base=tmp_path / "none", data=pairs_file, out=out, recipe=recipe, device="cpu")
    with pytest.raises(InputError, match="can't be read"):
        train_expert("concise", base=small_base, data=tmp_path / "none", out=out, recipe=recipe, device="cpu")
    with pytest.raises(UsageError, match="toaster"):
        train_expert("concise", base=small_base, data=pairs_file, out=out, recipe=recipe, device="toaster")
    wrong = recipe.replaced(lora=recipe.lora.replaced(target_modules=("no_such_layer",)))
    with pytest.raises(DeclarationError, match="no_such_layer"):
        train_expert("concise", base=small_base, data=pairs_file, out=out, recipe=wrong, device="cpu")
    head = recipe.replaced(lora=recipe.lora.replaced(target_modules=("lm_head",)))
    with pytest.raises(DeclarationError, match="lm_head"):
        train_expert("concise", base=small_base, data=pairs_file, out=out, recipe=head, device="cpu")
    short = recipe.replaced(dpo=recipe.dpo.replaced(max_length=4))
    with pytest.raises(InputError, match="max_length"):
        train_expert("concise", base=small_base, data=pairs_file, out=out, recipe=short, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_second_training_into_the_same_folder_is_refused_and_the_first_goes_on(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, expert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "concise"

    def train(progress: Heard | None = None, *, resume: bool = False) -> Path:
        return train_expert(
            "concise",
            base=small_base,
            data=pairs_file,
            out=out,
            recipe=recipe,
            catalogue=CATALOGUE,
            device="cpu",
            resume=resume,
            progress=progress,
        )

    refused: list[SoupError] = []

    class Second(Heard):
        def advance(self, side: str, report: StepReport) -> None:
            for resume in (False, True) if report.step == 5 else ():  # a checkpoint exists after step 3
                with pytest.raises(OutputExistsError, match="another run is writing this output") as caught:
                    train(resume=resume)
                refused.append(caught.value)

    train(Second())
    assert [error.where for error in refused] == [str(out)] * 2
    assert _bytes(out) == _bytes(expert)
    assert [path.name for path in tmp_path.iterdir()] == ["concise"]


def test_a_folder_in_the_way_is_left_alone(
    expert: Path, small_base: Path, pairs_file: Path, recipe: TrainingRecipe
) -> None:
    before = _bytes(expert)
    with pytest.raises(OutputExistsError) as caught:
        train_expert("concise", base=small_base, data=pairs_file, out=expert, recipe=recipe, device="cpu")
    assert "overwrite" not in caught.value.mend  # psoups train has no such option
    with pytest.raises(OutputExistsError, match="seed or versions differ"):  # another seed
        train_expert(
            "concise", base=small_base, data=pairs_file, out=expert, recipe=recipe, device="cpu", seed=1, resume=True
        )
    assert _bytes(expert) == before


def test_an_expert_of_a_base_that_has_changed_since_is_not_this_one(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "x"
    shutil.copytree(small_base, base)
    one_step = recipe.replaced(optimizer=recipe.optimizer.replaced(epochs=None, max_steps=1))
    heard = Heard()
    for _ in range(2):
        train_expert(
            "x", base=base, data=pairs_file, out=out, recipe=one_step, device="cpu", resume=True, progress=heard
        )
    assert heard.begun == [0]
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputExistsError, match="seed or versions differ"):
        train_expert("x", base=base, data=pairs_file, out=out, recipe=one_step, device="cpu", resume=True)


def test_conversations_need_a_chat_template(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat template"):
        train_expert("x", base=base, data=pairs_file, out=tmp_path / "x", recipe=recipe, device="cpu")


def test_plain_text_is_trained_as_it_is_and_said_so(small_base: Path, recipe: TrainingRecipe, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "wash: ", "chosen": "rub it", "rejected": "then rub it dry with a towel"}\n' * 4)
    heard = Heard()
    one_step = recipe.replaced(optimizer=recipe.optimizer.replaced(epochs=None, max_steps=1))
    train_expert("x", base=small_base, data=data, out=tmp_path / "x", recipe=one_step, device="cpu", progress=heard)
    assert "without the tokenizer's chat template" in heard.notes[0]


def _base_with(base: Path, folder: Path, template: str) -> Path:
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_template_that_refuses_the_messages_names_file_and_line(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    template = (small_base / "chat_template.jinja").read_text()
    guard = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    base = _base_with(small_base, tmp_path / "base", guard + template)
    lines = pairs_file.read_text().splitlines()
    pair = json.loads(lines[3])
    pair["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    lines[3] = json.dumps(pair)
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(lines))
    with pytest.raises(InputError, match="rejects the messages: System role not supported") as caught:
        train_expert("x", base=base, data=data, out=tmp_path / "x", recipe=recipe, device="cpu")
    assert caught.value.where == f"{data}:4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "pairs.jsonl"]


def test_what_is_left_out_or_cut_and_a_missing_end_are_told_before_the_training(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    template = (small_base / "chat_template.jinja").read_text().replace("{{ eos_token }}", "")
    base = _base_with(small_base, tmp_path / "base", template)
    data = tmp_path / "pairs.jsonl"
    pair = json.loads(pairs_file.read_text().splitlines()[0])
    shared = "wash the kettle with soap " * 30
    for field in ("chosen", "rejected"):
        pair[field] = [{"role": "assistant", "content": shared + field}]
    one_step = recipe.replaced(optimizer=recipe.optimizer.replaced(epochs=None, max_steps=1))

    class Ordered(Heard):
        def begin(self, side: str, *, step: int, num_steps: int) -> None:
            self.notes.append("the steps begin")

    data.write_text(pairs_file.read_text() + json.dumps(pair) + "\n")
    heard = Ordered()
    out = train_expert("x", base=base, data=data, out=tmp_path / "x", recipe=one_step, device="cpu", progress=heard)
    assert heard.notes[0] == (
        f"1 pair is left out: once cut to dpo.max_length (64) both answers are equal (the first is {data}:20)"
    )
    assert heard.notes[1].startswith("no end token ('<|eos|>') follows 19 of 19 chosen answers in the chat template")
    assert heard.notes[2:] == ["the steps begin"]
    record = read_expert_record(out)
    assert record is not None
    assert record.data is not None
    assert record.data.num_pairs == 20  # the pairs in the file, whose bytes the digest is of
    data.write_text(json.dumps(pair) + "\n")
    with pytest.raises(InputError, match="no pair is left"):
        train_expert("y", base=base, data=data, out=tmp_path / "y", recipe=recipe, device="cpu")
    assert not (tmp_path / "y").exists()


def test_a_pair_that_is_equal_once_cut_changes_no_byte(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    """The pair has no effect: the expert equals one trained without it."""
    one_step = recipe.replaced(optimizer=recipe.optimizer.replaced(epochs=None, max_steps=2))
    pair = json.loads(pairs_file.read_text().splitlines()[0])
    for field in ("chosen", "rejected"):
        pair[field] = [{"role": "assistant", "content": "wash the kettle with soap " * 30 + field}]
    found = []
    for number, more in enumerate(("", json.dumps(pair) + "\n")):
        data = tmp_path / f"{number}.jsonl"
        data.write_text(pairs_file.read_text() + more)
        out = train_expert("x", base=small_base, data=data, out=tmp_path / str(number), recipe=one_step, device="cpu")
        found.append((out / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_token_beyond_the_bases_embedding_names_file_and_line(
    small_base: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<kettle>"])
    tokenizer.save_pretrained(base)
    data = tmp_path / "pairs.jsonl"
    plain = {"prompt": "wash the", "chosen": " towel", "rejected": " <kettle>"}
    data.write_text("\n" + json.dumps(plain) + "\n")
    with pytest.raises(InputError, match=r"has no token .*<kettle>") as caught:
        train_expert("x", base=base, data=data, out=tmp_path / "x", recipe=recipe, device="cpu")
    assert caught.value.where == f"{data}:2"


def test_a_padding_token_that_only_the_tokenizer_has_changes_no_byte(
    expert: Path, small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"pad_token": "<|another pad|>"})
    tokenizer.save_pretrained(base)
    out = train_expert("concise", base=base, data=pairs_file, out=tmp_path / "x", recipe=recipe, device="cpu")
    theirs = load_file(expert / "adapter_model.safetensors")
    assert all(
        torch.allclose(tensor, theirs[name], atol=1e-6)
        for name, tensor in load_file(out / "adapter_model.safetensors").items()
    )


def test_a_diverging_training_fails_with_a_mend(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    wild = recipe.replaced(optimizer=recipe.optimizer.replaced(learning_rate=1e30, warmup_steps=0), sides={})
    with pytest.raises(RunError, match="diverged") as caught:
        train_expert("x", base=small_base, data=pairs_file, out=tmp_path / "x", recipe=wild, device="cpu")
    assert caught.value.exit_code == 1
    assert "learning_rate" in caught.value.mend
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "message",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "PytorchStreamWriter failed writing file data/0",
        "[enforce fail at inline_container.cc:672] . unexpected pos 125312 vs 125200",
    ],
)
def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    small_base: Path,
    pairs_file: Path,
    recipe: TrainingRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    message: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("peft.PeftModel.save_pretrained", full)
    with pytest.raises(RunError, match="no space") as caught:
        train_expert("x", base=small_base, data=pairs_file, out=tmp_path / "x", recipe=recipe, device="cpu")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
