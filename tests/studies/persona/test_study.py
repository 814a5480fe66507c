"""The whole study on a random base whose tokenizer knows Yes and No: every stage runs once, and a rerun runs none."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups import SoupModel
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import InputError, OutputExistsError, UsageError
from personalized_soups.studies.persona.combinations import combinations
from personalized_soups.studies.persona.experts import expert_pairs, tie_pairs
from personalized_soups.studies.persona.page import report
from personalized_soups.studies.persona.seed_run import SeedRun
from personalized_soups.studies.persona.settings import FITTED, JOINT, THIRD, PersonaStudy
from personalized_soups.studies.persona.statements import Statement, TraitSplit
from personalized_soups.studies.persona.study import run_persona
from personalized_soups.studies.persona.summary import margins_of, results, system_rows

TRAITS = ("calm", "keen", "tidy")


class NoBar:
    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        pass


def no_stage(title: str, total: int | None) -> Any:
    return nullcontext(NoBar())


def write_data(folder: Path) -> Path:
    folder.mkdir()
    for trait in TRAITS:
        rows = [
            {
                "statement": f"{trait} {'abcdefghij'[at // 10]}{'klmnopqrst'[at % 10]}x",
                "answer_matching_behavior": answer,
            }
            for at in range(40)
            for answer in [" Yes" if at % 2 else " No"]
        ]
        (folder / f"{trait}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    tokenizer.add_tokens(["Yes", "No"])
    model: Any = AutoModelForCausalLM.from_pretrained(small_base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def study(base: Path) -> PersonaStudy:
    recipe = load(shipped_recipe("train/persona.yaml"), TrainingRecipe)
    optimizer = recipe.optimizer.replaced(max_steps=2, batch_size=4)
    return PersonaStudy(
        traits=TRAITS,
        triples=(TRAITS,),
        num_seeds=1,
        num_train=8,
        num_validation=4,
        num_test=6,
        num_ties=4,
        num_joint=1,
        more_methods=("ties",),
        base=str(base),
        training=recipe.replaced(optimizer=optimizer),
        device="cpu",
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_every_stage_runs_and_is_kept(study: PersonaStudy, base: Path, tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    (run,) = run_persona(study, data, out, stage=no_stage)
    assert sorted(path.name for path in (out / "seed-0" / "experts").iterdir()) == sorted(run.experts)

    # the stored margins of a soup are those of the model that an adapter merged by PEFT's rule would be
    combination = combinations(TRAITS)[1]
    model = SoupModel.from_pretrained(base, out / "seed-0" / "experts", device="cpu")
    weights = dict.fromkeys(combination.experts, 1 / 3)
    statement = run.splits["keen"].test[0]
    ids = torch.tensor([model.generator.encoded(statement.prompt)])
    yes, no = (model.generator.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    with torch.no_grad(), model.mixture(weights):
        logits = model(input_ids=ids).logits[0, -1].double()
    expected = float(logits[yes] - logits[no]) * (1 if statement.agrees else -1)
    stored = margins_of(run, THIRD, combination)["keen"][0]
    assert stored == pytest.approx(expected, abs=1e-4)  # margins are stored with six digits, and logits are float32

    content = results([run])
    assert len(content["systems"]) == 8  # the base, six soups, ties
    assert all(0 <= row.means[0] <= 1 for row in system_rows([run]))
    text = report([run], {"train 0": 60.0}, {"train 0": 10**9})
    assert all(part in text for part in ("| not-keen", FITTED, "own adapter", "forecast"))

    # a rerun trains and measures nothing; a lost measurement is measured again, with the same result
    lost = out / "seed-0" / "test" / "calm+keen+tidy" / f"{JOINT} {combinations(TRAITS)[0].name}.json"
    before = lost.read_text()
    times = {path: path.stat().st_mtime_ns for path in out.glob("seed-0/**/*.json") if path != lost}
    lost.unlink()
    run_persona(study, data, out, stage=no_stage)
    assert lost.read_text() == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    with pytest.raises(OutputExistsError, match=r"other settings: num_ties\n"):
        run_persona(replace(study, num_ties=2), data, out, stage=no_stage)


def test_ties_come_from_all_other_traits_and_prefer_both_answers() -> None:
    parts = {trait: tuple(Statement(f"{trait} {at}", at % 2 == 0) for at in range(4)) for trait in TRAITS}
    splits = {trait: TraitSplit(listed, (), ()) for trait, listed in parts.items()}
    pairs = expert_pairs(splits, "keen", has_trait=False, num_ties=3)
    own, ties = pairs[:4], pairs[4:]
    assert [pair["chosen"][0]["content"] for pair in own] == ["No", "Yes", "No", "Yes"]
    assert all("keen" in pair["prompt"][1]["content"] for pair in own)
    assert ties == tie_pairs([parts["calm"][0], parts["tidy"][0], parts["calm"][1]])
    for first, second in zip(ties[::2], ties[1::2], strict=True):
        assert first["prompt"] == second["prompt"]
        assert (first["chosen"], first["rejected"]) == (second["rejected"], second["chosen"])


def test_the_loss_of_a_tie_is_least_where_the_expert_answers_as_the_base() -> None:
    d = np.linspace(-3, 3, 601)
    for beta in (0.1, 1.0):
        loss = np.logaddexp(0, -beta * d) + np.logaddexp(0, beta * d)
        assert d[np.argmin(loss)] == pytest.approx(0, abs=1e-9)


def test_a_group_of_unknown_traits_is_rejected() -> None:
    with pytest.raises(UsageError, match="traits without experts: lazy"):
        PersonaStudy(traits=TRAITS, triples=(("calm", "keen", "lazy"),))


def test_missing_data_is_named_before_anything_is_written(study: PersonaStudy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the statements can't be read"):
        run_persona(study, tmp_path, tmp_path / "run", stage=no_stage)
    assert not (tmp_path / "run").exists()


def test_seeds_after_the_first_measure_the_first_group_only() -> None:
    study = PersonaStudy()
    assert study.traits_of(1) == study.triples[0]
    assert study.triples_of(2) == study.triples[:1]
    assert len(study.joint_of(0)) == 4
    assert study.joint_of(1) == []
    assert SeedRun(study, 1, {}, Path()).experts[:2] == ("extraversion", "not-extraversion")
