from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import BaseRecord, ExpertRecord, write_record
from personalized_soups.devices import resolve_device
from personalized_soups.errors import FileFormatError, IncompatibleExpertsError, InputError, SoupError, UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.generation.prompts import PromptRequest
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.generation.sampling import Sampling, choose_tokens, uniforms

PROMPTS = ["wash the kettle", "rub", "how do I clean the old kettle with warm water?", "dry the towel so that"]


@pytest.fixture(scope="module")
def generator(small_base: Path) -> Generator:
    return Generator.open(small_base, device="cpu")


def test_greedy_answers_are_those_of_transformers(generator: Generator) -> None:
    tokenizer, model = generator.tokenizer, generator.model
    ours = generator.answers(PROMPTS, max_new_tokens=12, greedy=True, batch_size=3)
    for prompt, (answer,) in zip(PROMPTS, ours, strict=True):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        theirs = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == str(theirs).strip()


def test_answers_depend_on_the_seed_and_not_on_the_batch(generator: Generator) -> None:
    wide = generator.answers(PROMPTS, num_samples=3, max_new_tokens=10, batch_size=64, seed=5)
    assert generator.answers(PROMPTS, num_samples=3, max_new_tokens=10, batch_size=2, seed=5) == wide
    assert generator.answers(PROMPTS, num_samples=3, max_new_tokens=10, batch_size=64, seed=6) != wide
    assert [len(answers) for answers in wide] == [3] * len(PROMPTS)
    assert len({answer for answers in wide for answer in answers}) > len(PROMPTS)  # samples of one prompt differ


def test_sampling_leaves_torchs_own_generator_alone(generator: Generator) -> None:
    before = torch.random.get_rng_state()
    generator.answers(PROMPTS[:1], max_new_tokens=4)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("greedy", [True, False])
def test_the_stream_is_the_answer_in_pieces(generator: Generator, greedy: bool) -> None:
    ((answer,),) = generator.answers(PROMPTS[2:3], max_new_tokens=20, seed=3, greedy=greedy)
    pieces = list(generator.stream(PROMPTS[2], max_new_tokens=20, seed=3, greedy=greedy))
    assert "".join(pieces) == answer
    assert len(pieces) > 3


def test_a_reader_who_stops_early_is_not_waited_for(generator: Generator) -> None:
    pieces = generator.stream(PROMPTS[2], max_new_tokens=200, seed=3)
    assert next(pieces)
    pieces.close()  # type: ignore[attr-defined] # a generator
    assert not [thread for thread in threading.enumerate() if thread.daemon and "_run" in thread.name]


def test_a_fault_while_streaming_reaches_the_reader(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generator.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generator.stream(PROMPTS[0]))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_bases_own_generation_config_does_not_count(small_base: Path, tmp_path: Path, adapted: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    adapter = tmp_path / "adapter" if adapted else None
    if adapter is not None:
        _write_random_adapter(small_base, adapter)
    plain = Generator.open(base, adapter, device="cpu", fold=False).answers(PROMPTS, max_new_tokens=10, seed=2)
    GenerationConfig(do_sample=True, temperature=5.0, top_k=2, repetition_penalty=9.0).save_pretrained(base)
    odd = Generator.open(base, adapter, device="cpu", fold=False)
    assert odd.answers(PROMPTS, max_new_tokens=10, seed=2) == plain


def test_a_row_stops_at_a_stop_token_while_others_go_on(generator: Generator) -> None:
    full = generator.answers(PROMPTS, max_new_tokens=30, seed=1)
    shorter = Generator(generator.model, generator.tokenizer)
    shorter.stop_ids = frozenset(range(6, 100))  # about a third of the vocabulary: rows end at different steps
    cut = shorter.answers(PROMPTS, max_new_tokens=30, seed=1)
    assert len({len(part) for (part,) in cut}) > 1
    for (whole,), (part,) in zip(full, cut, strict=True):
        assert len(part) < len(whole)
        assert whole.startswith(part.rstrip("\ufffd"))  # a character may have been cut in two


def test_a_chat_is_rendered_as_its_messages(generator: Generator) -> None:
    chat = [{"role": "user", "content": PROMPTS[0]}]
    assert generator.answers([chat], max_new_tokens=6) == generator.answers(PROMPTS[:1], max_new_tokens=6)


def test_tokens_follow_the_softmax_and_never_have_probability_zero() -> None:
    logits_BV = torch.tensor([[0.0, float("-inf"), 1.0, 2.0]]).repeat(20000, 1)
    draw_B = torch.from_numpy(uniforms(7, 0, 20000))
    counts = torch.bincount(choose_tokens(logits_BV, draw_B, 1.0), minlength=4) / 20000
    want = torch.softmax(logits_BV[0], -1)
    assert counts[1] == 0
    # four standard errors of a share over 20000 draws
    torch.testing.assert_close(counts, want, atol=4 * (0.25 / 20000) ** 0.5, rtol=0)
    edges = choose_tokens(logits_BV[:2], torch.tensor([0.0, 1 - 2.0**-24]), 1.0)
    assert edges.tolist() == [0, 3]


def test_each_row_may_have_a_temperature_and_a_nucleus_of_its_own() -> None:
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    draw_B = torch.from_numpy(uniforms(1, 0, 4))
    temperature_B, top_p_B = torch.tensor([0.5, 1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 0.8])
    together = choose_tokens(logits_BV, draw_B, temperature_B, top_p_B)
    for row in range(4):
        one = slice(row, row + 1)
        assert choose_tokens(logits_BV[one], draw_B[one], temperature_B[one], top_p_B[one]) == together[one]
    # a nucleus of 1 is all tokens, one of 0 the likeliest alone
    assert torch.equal(choose_tokens(logits_BV[:2], draw_B[:2], temperature_B[:2]), together[:2])
    assert choose_tokens(logits_BV[1:2], draw_B[1:2], 1.0) == together[1]
    assert together[2] == logits_BV[2].argmax()


def test_a_temperature_near_zero_takes_the_likeliest_token() -> None:
    logits_BV = 20 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    draw_B = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    for temperature in (1e-3, 1e-38, 1e-300):
        assert torch.equal(choose_tokens(logits_BV, draw_B, temperature), logits_BV.argmax(-1))
        assert torch.equal(choose_tokens(logits_BV, draw_B, torch.full((3,), temperature)), logits_BV.argmax(-1))


def test_a_folded_adapter_answers_as_a_separate_one(small_base: Path, tmp_path: Path) -> None:
    _write_random_adapter(small_base, tmp_path / "adapter")
    folded, separate = (
        Generator.open(small_base, tmp_path / "adapter", device="cpu", fold=fold) for fold in (True, False)
    )
    assert not hasattr(folded.model, "peft_config") or not list(folded.model.peft_config)
    base = Generator.open(small_base, device="cpu").answers(PROMPTS, max_new_tokens=8, greedy=True)
    answers = folded.answers(PROMPTS, max_new_tokens=8, greedy=True)
    assert separate.answers(PROMPTS, max_new_tokens=8, greedy=True) == answers
    assert answers != base


def test_an_adapter_in_a_pickle_is_refused_unread(small_base: Path, tmp_path: Path) -> None:
    _write_random_adapter(small_base, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileFormatError, match="missing"):
        Generator.open(small_base, tmp_path, device="cpu")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileFormatError, match="pickle"):
        Generator.open(small_base, tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("truncated", "the header claims"),
        ("config", "not a JSON object"),
        ("unknown kind", "can't be put on this base"),
        ("nan", "NaN"),
        ("shapes", "size mismatch"),
        ("other modules", "not found in the base"),
        ("incomplete", "lacks"),
        ("other names", "lacks"),
    ],
)
def test_a_damaged_or_strange_adapter_is_refused(small_base: Path, tmp_path: Path, fault: str, what: str) -> None:
    _write_random_adapter(small_base, tmp_path)
    tensors_file, config_file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(tensors_file), json.loads(config_file.read_text())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    match fault:
        case "nan":
            tensors[name][0, 0] = float("nan")
        case "shapes":
            tensors[name] = tensors[name][:, :7].contiguous()
        case "incomplete":
            del tensors[name]
        case "other names":
            tensors[name.replace("q_proj", "qq_proj")] = tensors.pop(name)
        case "other modules":
            config["target_modules"] = ["w1"]
        case "unknown kind":
            config["peft_type"] = "WIZARD"
    save_file(tensors, tensors_file)
    config_file.write_text("{" if fault == "config" else json.dumps(config))
    if fault == "truncated":
        tensors_file.write_bytes(tensors_file.read_bytes()[:500])
    with pytest.raises(InputError, match=what) as caught:
        Generator.open(small_base, tmp_path, device="cpu")
    assert str(tmp_path) in caught.value.where


def test_an_adapter_of_another_base_is_refused(small_base: Path, tmp_path: Path) -> None:
    _write_random_adapter(small_base, tmp_path)
    mine = BaseRecord(name="mine", fingerprint=base_fingerprint(small_base))
    write_record(tmp_path, ExpertRecord(side="x", base=mine))
    Generator.open(small_base, tmp_path, device="cpu")
    write_record(tmp_path, ExpertRecord(side="x", base=mine.model_copy(update={"fingerprint": "0" * 64})))
    with pytest.raises(IncompatibleExpertsError, match="trained on mine"):
        Generator.open(small_base, tmp_path, device="cpu")
    Generator.open(small_base, tmp_path, device="cpu", same_base=True)


@pytest.mark.parametrize(
    ("fault", "what"), [("truncated", "truncated"), ("incomplete", "lack 1 of its tensors"), ("tokenizer", "tokenizer")]
)
def test_a_damaged_base_is_refused(small_base: Path, tmp_path: Path, fault: str, what: str) -> None:
    """transformers fills missing tensors with random numbers."""
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    path = base / "model.safetensors"
    match fault:
        case "truncated":
            path.write_bytes(path.read_bytes()[:5000])
        case "incomplete":
            tensors = load_file(path)
            del tensors["model.norm.weight"]
            save_file(tensors, path, metadata={"format": "pt"})
        case _:
            (base / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=what) as caught:
        Generator.open(base, device="cpu")
    assert str(base) in caught.value.where


def test_a_missing_base_is_reported_with_a_fix(small_base: Path, tmp_path: Path) -> None:
    faults: list[SoupError] = []
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_bytes((small_base / "config.json").read_bytes())
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"\x80\x04")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pickled" / name).write_bytes((small_base / name).read_bytes())
    for base in (tmp_path / "nothing", tmp_path, tmp_path / "pickled", "nobody/nothing"):
        with pytest.raises(InputError) as caught:
            Generator.open(base, device="cpu")
        faults.append(caught.value)
    assert [fault.where for fault in faults] == [
        str(tmp_path / "nothing"),
        str(tmp_path),
        str(tmp_path / "pickled"),
        "nobody/nothing",
    ]
    assert "config.json is missing" in faults[1].what


def test_devices_that_are_not_there_are_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError):
        resolve_device("toaster")
    with pytest.raises(UsageError):
        resolve_device("cuda:63")
    with pytest.raises(UsageError, match="can't compute"):
        resolve_device("meta")


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


def _write_random_adapter(base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    with quiet_transformers():
        get_peft_model(model, config).save_pretrained(str(folder))


def _with_tokens(base: Path, folder: Path, **special: str) -> Path:
    """Return a copy of a base whose tokenizer has a token more than the base has embeddings."""
    shutil.copytree(base, folder)
    tokenizer = load_tokenizer(folder)
    added = tokenizer.add_special_tokens({**special}) if special else tokenizer.add_tokens(["<kettle>"])
    assert added == 1
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_beyond_the_embedding_is_refused_by_name(small_base: Path, tmp_path: Path) -> None:
    generator = Generator.open(_with_tokens(small_base, tmp_path / "base"), device="cpu")
    size = int(generator.model.get_input_embeddings().num_embeddings)
    assert generator.num_embeddings == size
    for answer in (lambda text: generator.answers([text]), lambda text: list(generator.stream(text))):
        with pytest.raises(InputError, match=f"no token {size} \\('<kettle>'\\): it has {size}") as caught:
            answer("wash the <kettle>")
        assert caught.value.where == "the prompt that begins 'wash the <kettle>'"
    generator.model.resize_token_embeddings(size + 1)
    resized = Generator(generator.model, generator.tokenizer)
    assert len(resized.answers(["wash the <kettle>"], max_new_tokens=2)) == 1


def test_a_padding_token_beyond_the_embedding_changes_no_answer(
    generator: Generator, small_base: Path, tmp_path: Path
) -> None:
    """It fills rows of unequal length, and rows whose answer has ended."""
    other = Generator.open(_with_tokens(small_base, tmp_path / "base", pad_token="<|another pad|>"), device="cpu")
    assert int(other.tokenizer.pad_token_id) == other.num_embeddings
    wanted = generator.answers(PROMPTS, max_new_tokens=12, seed=2)
    assert other.answers(PROMPTS, max_new_tokens=12, seed=2) == wanted


def test_prompts_of_a_file_are_checked_with_their_lines(generator: Generator) -> None:
    requests = [PromptRequest("wash", None, "p.txt:1"), PromptRequest("wash the kettle " * 99, None, "p.txt:4")]
    generator.check(requests[:1])
    with pytest.raises(InputError, match="tokens") as caught:
        generator.check(requests)
    assert caught.value.where == "p.txt:4"


def test_a_prompt_that_gives_no_token_is_refused(small_base: Path) -> None:
    generator = Generator.open(small_base, device="cpu")
    generator.tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(InputError, match="no tokens"):
        generator.answers(["wash"])
