"""`make_questions`: prepare a pool of questions, so that asking a user needs no generation.

Shapes: N = answers, D = base rewards, Q = questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from personalized_soups.adapters.provenance import library_versions
from personalized_soups.declare.evidence import Question
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import InputError, UsageError
from personalized_soups.scoring.bounded_rewards import BoundedRewards, typical_bounds
from personalized_soups.users.answers.candidates import sample_candidates
from personalized_soups.users.answers.pairing import (
    TYPICAL_MARGIN,
    balanced_signs,
    informative_pairs,
    pairs_within,
    scaled_ridge,
)
from personalized_soups.users.answers.pool import PooledExpert, PoolRecord, QuestionPool

if TYPE_CHECKING:
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.scoring.implicit_rewards import ImplicitRewards

# Called with the name of a stage, the number of finished units of work, and the number of all units.
OnProgress = Callable[[str, int, int], None]

SAMPLING = "sampling answers"
REWARDING = "computing rewards"


def make_questions(
    model: SoupModel,
    prompts: Sequence[str],
    *,
    num_questions: int = 200,
    answers_per_prompt: int = 4,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    whole_sentences: bool = False,
    length_normalized: bool = False,
    broken_share: float = 0.1,
    typical_margin: float = TYPICAL_MARGIN,
    base: Path | str | None = None,
    folders: Sequence[Path | str] = (),
    options: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> QuestionPool:
    """Sample answers, compute the experts' implicit rewards of them, and choose pairs that tell users apart.

    The rewards are bounded (`BoundedRewards`), with the centres and scales of the sampled answers. The pairs are chosen
    by `informative_pairs`, and `balanced_signs` decides which answer is `a`. The prior of a user's weights is
    `scaled_ridge` of the chosen pairs. The pool is not written: call its `write`.

    Args:
        model: the base with the experts, with a tokenizer.
        prompts: the prompts. Repeated prompts count once.
        num_questions: the number of questions. The pool has fewer if there are too few different pairs.
        answers_per_prompt: the number of answers to sample for each prompt, at least 2. See `sample_candidates`.
        temperature, top_p: how answers are sampled. See `sample_candidates`.
        max_new_tokens: the maximum number of tokens of an answer.
        batch_size: the number of rows in a batch.
        seed: the seed of everything that is random.
        whole_sentences: whether an answer that is cut off at `max_new_tokens` is kept up to its last whole sentence
            instead of being left out. A model that rarely ends an answer within the limit needs it.
        length_normalized: divide each reward by the number of the answer's tokens.
        broken_share: the share of the answers that are left out because their least likely token is the least likely
            under the base, in [0, 1). Broken answers have extreme rewards, so the rules that choose questions would
            prefer them, and answers to them say little about a user's taste. Among 400 answers of the tiny base, the
            12 that its grammar rejects were all among the last 5% by this measure.
        typical_margin: the root mean square of the margins of the questions under the prior.
        base: the folder or hub id of the base. By default, the place from which the model was loaded.
        folders: the folders of the experts, which the pool names in the command that makes it again.
        options: further values for the pool's record.
        on_progress: called after each batch.

    Raises:
        UsageError: if a number is out of range.
        InputError: if the prompts give no pair of different answers.
        SoupError: if `SoupModel.generate` or `ImplicitRewards` raises it.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> pool = make_questions(model, ["How do I clean a lamp?"], num_questions=2)
        >>> pool.differences.shape
        (2, 6)
    """
    _check_numbers(
        num_questions=(num_questions, 1), answers_per_prompt=(answers_per_prompt, 2), batch_size=(batch_size, 1)
    )
    if not 0 < temperature < np.inf:
        raise UsageError(
            f"temperature is {temperature:g}, but must be a finite number greater than 0: the answers must differ",
            where="temperature",
            mend="give temperature=1",
        )
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p:g}, but must be in (0, 1]", where="top_p", mend="give top_p=0.95")
    if not 0 <= broken_share < 1:
        raise UsageError(
            f"broken_share is {broken_share:g}, but must be at least 0 and less than 1",
            where="broken_share",
            mend="give broken_share=0.1",
        )
    from personalized_soups.scoring.implicit_rewards import ImplicitRewards

    rewards = ImplicitRewards(model, length_normalized=length_normalized, batch_size=batch_size, base=base)
    _ = rewards.digest  # raises before the sampling if the base has no place
    different = list(dict.fromkeys(prompts))

    def report(stage: str, total: int) -> Callable[[int], None]:
        return lambda done: None if on_progress is None else on_progress(stage, done, total)

    items = sample_candidates(
        model,
        different,
        answers_per_prompt=answers_per_prompt,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        whole_sentences=whole_sentences,
        on_done=report(SAMPLING, answers_per_prompt * len(different)),
    )
    measured = rewards.measured(items, on_done=report(REWARDING, len(items)))
    kept = _unbroken(measured.least_log_probs, broken_share)
    items = [items[index] for index in kept]
    unbounded = measured.rewards[kept]
    pairs = pairs_within([item.prompt for item in items])
    if np.array_equal(unbounded[pairs[:, 0]], unbounded[pairs[:, 1]]):
        raise InputError(
            f"the {len(items)} different answers to {len(different)} prompts give no pair with different rewards",
            where="prompts",
            mend=f"give more prompts, or more than {max_new_tokens} max_new_tokens, which cut answers off, or "
            "whole_sentences=True",
        )
    centres, scales = typical_bounds(unbounded)
    bounded_rewards = BoundedRewards(rewards, centres=centres, scales=scales)
    features = bounded_rewards.bounded(unbounded).astype(np.float32)
    differences = features[pairs[:, 0]].astype(np.float64) - features[pairs[:, 1]]
    asked = [items[first].prompt for first, _ in pairs]
    chosen = informative_pairs(differences, asked, num_questions, scaled_ridge(differences))
    prior = scaled_ridge(differences[chosen], typical_margin=typical_margin)
    turned = balanced_signs(differences[chosen], prior.covariance, seed)
    ordered = np.where(turned[:, None], pairs[chosen][:, ::-1], pairs[chosen])
    digits = len(str(len(chosen)))
    questions = tuple(
        Question(id=f"q{number:0{digits}}", prompt=items[a].prompt, a=items[a].answer, b=items[b].answer)
        for number, (a, b) in enumerate(ordered, start=1)
    )
    record = PoolRecord(
        names=rewards.names,
        digest=bounded_rewards.digest,
        centres=tuple(centres.tolist()),
        scales=tuple(scales.tolist()),
        experts=_experts(rewards, model),
        base=str(base or model.model.name_or_path),
        base_fingerprint=rewards.base_fingerprint,
        folders=tuple(map(str, folders)),
        options={
            "num_questions": num_questions,
            "answers_per_prompt": answers_per_prompt,
            "num_prompts": len(different),
            "num_answers": len(items),
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "whole_sentences": whole_sentences,
            "length_normalized": length_normalized,
            "broken_share": broken_share,
            "dtype": str(model.dtype).removeprefix("torch."),
            **(options or {}),
        },
        prior={"kind": "ridge", "penalty": float(1 / prior.covariance[0, 0]), "typical_margin": typical_margin},
        versions=library_versions("numpy", "torch", "transformers"),
    )
    return QuestionPool(record, questions, features[ordered[:, 0]], features[ordered[:, 1]], prior)


def _unbroken(least_log_probs_N: npt.NDArray[np.float64], broken_share: float) -> npt.NDArray[np.intp]:
    """Return the indices of the answers to keep, in order: all but the `broken_share` with the least likely tokens."""
    num_broken = int(broken_share * len(least_log_probs_N))
    return np.sort(np.argsort(least_log_probs_N, kind="stable")[num_broken:])


def _experts(rewards: ImplicitRewards, model: SoupModel) -> tuple[PooledExpert, ...]:
    experts = [model.experts[name] for name in rewards.names]
    rule = SideRule.of(experts)
    return tuple(
        PooledExpert(
            name=expert.name,
            digest=rewards.expert_digests[expert.name],
            side=expert.side,
            dimension=rule.dimension_of.get(expert.name),
            beta=rewards.betas[expert.name],
        )
        for expert in experts
    )


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise UsageError(
                f"{name} is {value}, but must be at least {least}", where=name, mend=f"give {name}={least} or more"
            )
