"""P-DPO in one forward pass against a float64 oracle that computes every row alone, and the laws of its gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups.declare.training import UserModelKind
from personalized_soups.systems.p_rlhf.p_dpo import TermRows, answer_log_probs, embedded_rows, p_dpo_loss
from personalized_soups.systems.p_rlhf.user_tables import UserTables

WIDTH, TOKENS, USERS, BETA = 64, 3, 4, 0.7
KINDS: tuple[UserModelKind, ...] = ("individual", "cluster", "uninformative")


@pytest.fixture(scope="module")
def model(small_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float64).eval().requires_grad_(False)


def tables(model: Any, kind: UserModelKind, seed: int = 0) -> UserTables:
    drawn = UserTables.drawn(
        kind,
        num_users=USERS,
        num_tokens=TOKENS,
        num_clusters=2,
        embed=model.get_input_embeddings(),
        vocabulary=300,
        seed=seed,
    )
    return drawn.double()


def examples(bos: int | None) -> list[dict[str, Any]]:
    """Four pairs of different lengths: two users, the generic user, and a pair that is cut."""
    random = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(6, 300, (count,), generator=random).tolist()

    start = [] if bos is None else [bos]
    pairs = [(4, 3, 6), (7, 5, 1), (2, 4, 4), (5, 30, 2)]
    return [
        {"prompt_ids": start + ids(prompt), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected), "user": user}
        for (prompt, chosen, rejected), user in zip(pairs, (1, 0, 3, 4), strict=True)
    ]


def log_prob(model: Any, prompt: list[int], answer: list[int], soft: Tensor | None, bos: int | None) -> float:
    """Return the log-probability of an answer: one row without padding, with the soft tokens put in by hand."""
    embed = model.get_input_embeddings()
    cut = 1 if prompt[0] == bos else 0
    parts = [prompt[:cut], prompt[cut:] + answer]
    embeddings = [embed(torch.tensor(part, dtype=torch.int64)) for part in parts]
    if soft is not None:
        embeddings.insert(1, soft)
    with torch.no_grad():
        logits = model(inputs_embeds=torch.cat(embeddings)[None]).logits[0]
    shares = logits.softmax(-1)
    places = range(len(logits) - len(answer) - 1, len(logits) - 1)
    return sum(math.log(float(shares[place, token])) for place, token in zip(places, answer, strict=True))


def soft_by_hand(user_tables: UserTables, user: int) -> Tensor:
    """Return the soft tokens of a user, from the formulas with explicit sums."""
    table = dict(user_tables.named_parameters())
    if user_tables.kind == "cluster":
        exps = table["logits"][user].exp()
        return sum(exps[k] / exps.sum() * table["centers"][k] for k in range(2))  # type: ignore[return-value]
    return table["generic"] + (table["offsets"][user - 1] if user_tables.kind == "individual" and user else 0)


def loss_alone(model: Any, user_tables: UserTables, alpha: float, bos: int | None, max_length: int) -> float:
    total = 0.0
    for example in examples(bos):
        prompt = example["prompt_ids"]
        answers = [example[name][: max_length - len(prompt)] for name in ("chosen_ids", "rejected_ids")]
        reference = [log_prob(model, prompt, answer, None, bos) for answer in answers]
        for user, weight in ((example["user"], alpha), (0, 1 - alpha)):
            soft = soft_by_hand(user_tables, user)
            chosen, rejected = (
                log_prob(model, prompt, answer, soft, bos) - base
                for answer, base in zip(answers, reference, strict=True)
            )
            total += weight * math.log1p(math.exp(-BETA * (chosen - rejected)))
    return total / 4


def loss_of(model: Any, user_tables: UserTables, alpha: float, bos: int | None, max_length: int = 12) -> Tensor:
    rows = TermRows(pad_id=2, bos_id=bos, max_length=max_length, num_soft=TOKENS, alpha=alpha)
    bare = TermRows(pad_id=2, bos_id=bos, max_length=max_length, num_soft=0, alpha=alpha)
    pairs = examples(bos)
    base = bare([{**pair, "user": 0} for pair in pairs])
    reference_R2 = answer_log_probs(model, model.get_input_embeddings()(base["input_ids"]), base)[0].sum(1).chunk(2)
    for pair, *reference in zip(pairs, *reference_R2, strict=True):
        pair["reference"] = [float(value) for value in reference]
    inputs = rows(pairs)
    embeds = embedded_rows(model, inputs, user_tables(inputs["users"]))
    policy_R = answer_log_probs(model, embeds, inputs)[0].sum(dim=1)
    return p_dpo_loss(policy_R, inputs["reference"], inputs["weights"], beta=BETA, num_pairs=4)[0]


@pytest.mark.parametrize("bos", [None, 0], ids=["no-bos", "bos"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_rows_computed_alone(
    model: Any, kind: UserModelKind, alpha: float, bos: int | None
) -> None:
    user_tables = tables(model, kind)
    want = loss_alone(model, user_tables, alpha, bos, 12)
    # Reference log-probabilities, below 60, and weights are float32, and so are the norms within the base.
    owed = 2 * BETA * 60 * 2**-24 + 2**-24
    assert float(loss_of(model, user_tables, alpha, bos).detach()) == pytest.approx(want, abs=owed)
    assert abs(want - math.log(2)) > 0.01  # at log 2 the soft tokens would do nothing


@pytest.mark.parametrize("kind", KINDS)
def test_the_generic_user_depends_on_no_table_of_a_known_user(model: Any, kind: UserModelKind) -> None:
    user_tables = tables(model, kind)
    before = user_tables(torch.tensor([0, 1, 4]))
    with torch.no_grad():
        for name, table in user_tables.named_parameters():
            if name == "offsets":
                table.add_(1000.0)
            elif name == "logits":
                table[1:].add_(torch.arange(2))
    after = user_tables(torch.tensor([0, 1, 4]))
    assert torch.equal(after[0], before[0])
    if kind == "uninformative":
        assert torch.equal(before, before[:1].expand(3, -1, -1))
    else:
        assert not torch.equal(after[1], before[1])
        assert not torch.equal(before[1], before[2])
    if kind == "individual":
        assert torch.equal(before[0], dict(user_tables.named_parameters())["generic"])


def test_with_alpha_0_users_learn_nothing_and_with_alpha_1_the_generic_term_has_no_rows(model: Any) -> None:
    gradients: dict[float, dict[str, Tensor]] = {}
    for alpha in (0.0, 0.5, 1.0):
        user_tables = tables(model, "individual")
        loss_of(model, user_tables, alpha, None).backward()
        gradients[alpha] = {
            name: table.grad for name, table in user_tables.named_parameters() if table.grad is not None
        }
    assert not gradients[0.0]["offsets"].any()
    assert gradients[0.0]["generic"].any()
    # users 1, 3 and 4 have pairs, user 2 has none
    assert [bool(rows.any()) for rows in gradients[0.5]["offsets"]] == [True, False, True, True]
    assert [bool(rows.any()) for rows in gradients[1.0]["offsets"]] == [True, False, True, True]
    # e_0 is a part of every e_u. Without the generic term, its gradient is the sum of theirs, and of the pair whose
    # user is the generic user.
    rows = TermRows(pad_id=2, bos_id=None, max_length=12, num_soft=TOKENS, alpha=1.0)
    assert rows([{**pair} for pair in examples(None)])["users"].tolist() == [1, 0, 3, 4]
    own = tables(model, "individual")
    rest = gradients[1.0]["generic"] - gradients[1.0]["offsets"].sum(0)
    only = [pair for pair in examples(None) if pair["user"] == 0]
    assert len(only) == 1
    generic = _gradient_of_generic(model, own, only)
    # The base's norms compute in float32, whatever its dtype: five norms on a path, forwards and backwards.
    assert float((rest - generic / 4).norm() / rest.norm()) < 2 * 5 * 2**-24


def _gradient_of_generic(model: Any, user_tables: UserTables, pairs: list[dict[str, Any]]) -> Tensor:
    """Return the gradient of e_0 from pairs of the generic user, with autograd over rows computed one by one."""
    embed = model.get_input_embeddings()
    generic = dict(user_tables.named_parameters())["generic"]
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        margins = []
        for name in ("chosen_ids", "rejected_ids"):
            ids = (pair["prompt_ids"] + pair[name])[:12]
            logits = model(inputs_embeds=torch.cat([generic, embed(torch.tensor(ids))])[None]).logits[0]
            answer = ids[len(pair["prompt_ids"]) :]
            scores = logits.log_softmax(-1)[-len(answer) - 1 : -1]
            own = scores.gather(1, torch.tensor(answer)[:, None]).sum()
            margins.append(own - log_prob(model, pair["prompt_ids"], answer, None, None))
        total = total - torch.nn.functional.logsigmoid(BETA * (margins[0] - margins[1]))
    return torch.autograd.grad(total, generic)[0]


def test_a_batch_has_one_row_for_each_term_and_answer(model: Any) -> None:
    rows = TermRows(pad_id=2, bos_id=0, max_length=12, num_soft=TOKENS, alpha=0.25)
    batch = rows(examples(0))
    assert batch["users"].tolist() == [1, 0, 0, 3, 0, 4, 0]
    assert batch["pairs"].tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert batch["weights"].tolist() == [0.25, 0.75, 1.0, 0.25, 0.75, 0.25, 0.75]
    assert batch["input_ids"].shape == (14, 12 + TOKENS)
    assert batch["starts"].tolist() == [1] * 14
    assert batch["input_ids"][0, : TOKENS + 2].tolist() == [0, 2, 2, 2, examples(0)[0]["prompt_ids"][1]]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[:7] == [11, 11, 15, 10, 10, 15, 15]
    answers = batch["completion_mask"].sum(1).tolist()
    assert answers[:7] == [3, 3, 4, 4, 4, 6, 6]
    assert answers[7:] == [6, 6, 1, 4, 4, 2, 2]


def test_initial_soft_tokens_are_embeddings_of_different_tokens(model: Any) -> None:
    embeddings = model.get_input_embeddings().weight.detach()
    found = []
    for seed in (0, 0, 1):
        user_tables = tables(model, "individual", seed=seed)
        rows = torch.cat([table.reshape(-1, WIDTH) for table in user_tables.parameters()]).detach()
        distances = torch.cdist(rows, embeddings[:300].double())
        assert float(distances.min(dim=1).values.max()) < 1e-6
        found.append(distances.argmin(dim=1).tolist())
    assert len(set(found[0])) == TOKENS * (USERS + 1)
    assert found[0] == found[1] != found[2]
    few = UserTables.drawn(
        "individual",
        num_users=5,
        num_tokens=2,
        num_clusters=0,
        embed=model.get_input_embeddings(),
        vocabulary=7,
        seed=0,
    )
    rows = torch.cat([table.reshape(-1, WIDTH) for table in few.parameters()]).detach()
    used = torch.cdist(rows.double(), embeddings[:7].double()).argmin(dim=1).tolist()
    assert sorted(used.count(token) for token in range(7)) == [1, 1, 2, 2, 2, 2, 2]
