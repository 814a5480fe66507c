"""The P-DPO loss, and the rows of a batch for it. arXiv 2402.05133, equation 6.

A pair has two terms: that of its user, with weight alpha, and that of the generic user, with weight 1 - alpha. All
terms of a batch are rows of one forward pass. Terms with weight 0 have no rows, and a pair whose user is the generic
user has one term with weight 1.

Shapes: B = pairs, M = terms, R = 2 M rows (all chosen answers, then all rejected answers), T = tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from personalized_soups.generation.soft_tokens import embedded, soft_start, with_room


def p_dpo_loss(
    policy_R: Tensor, reference_M2: Tensor, weights_M: Tensor, *, beta: float, num_pairs: int
) -> tuple[Tensor, Tensor]:
    """Return -1/B times the sum over terms of weight * log sigmoid(margin), a scalar, and the margins [M].

    A margin is beta times the difference of the log-ratios of the chosen and of the rejected answer.

    Args:
        policy_R: the log-probability of each row's answer.
        reference_M2: the log-probabilities of the chosen and of the rejected answer of each term's pair under the base.
        weights_M: the weight of each term.
        beta: DPO's beta.
        num_pairs: B.
    """
    chosen_M, rejected_M = policy_R.chunk(2)
    reference_chosen_M, reference_rejected_M = reference_M2.unbind(dim=1)
    margins_M = beta * ((chosen_M - reference_chosen_M) - (rejected_M - reference_rejected_M))
    return -(weights_M * functional.logsigmoid(margins_M)).sum() / num_pairs, margins_M


def answer_log_probs(model: Any, embeds_RTH: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities [R, T - 1] of each row's tokens after the first, and the mask of its answer.

    Tokens that are not of the answer have 0. The result is float32, or float64 if the logits are.

    Args:
        model: a causal language model of transformers.
        embeds_RTH: the embeddings of the rows, padded on the right.
        inputs: `input_ids`, `attention_mask` and `completion_mask` of the rows.
    """
    logits_RTV = model(inputs_embeds=embeds_RTH, attention_mask=inputs["attention_mask"], use_cache=False).logits
    mask = inputs["completion_mask"][:, 1:].bool()
    # Only the answers' logits are normalised, because those of the prompts would take much memory.
    logits_LV = logits_RTV[:, :-1][mask]
    chosen_LV = torch.log_softmax(logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32)), dim=-1)
    own_L = chosen_LV.gather(-1, inputs["input_ids"][:, 1:][mask][:, None])[:, 0]
    return own_L.new_zeros(mask.shape).masked_scatter(mask, own_L), mask


@dataclass
class TermRows:
    """Makes the rows of a batch. An instance is a collator of transformers' Trainer.

    Args:
        pad_id: the id that pads rows on the right, and fills the places of soft tokens.
        bos_id: the id of the beginning-of-sequence token, or None.
        max_length: the maximum number of tokens of prompt and answer. Longer texts lose their end.
        num_soft: the number of soft tokens of each row.
        alpha: the weight of the user's term.
    """

    pad_id: int
    bos_id: int | None
    max_length: int
    num_soft: int
    alpha: float

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch.

        Args:
            examples: for each pair, `prompt_ids`, `chosen_ids`, `rejected_ids`, the number of its `user`, and, except
                in the pass for the reference, its `reference` log-probabilities.

        Returns:
            `input_ids`, `attention_mask` and `completion_mask` [R, T], `starts` [R] (the column of the first soft
            token), `users`, `weights` and `pairs` [M] (the index of the term's pair), and `reference` [M, 2].
        """
        terms = [
            (index, user, weight)
            for index, example in enumerate(examples)
            for user, weight in self.terms(int(example["user"]))
        ]
        answers = [
            *((index, "chosen_ids") for index, _, _ in terms),
            *((index, "rejected_ids") for index, _, _ in terms),
        ]
        rows = [self._row(examples[index], answer) for index, answer in answers]
        width = max(len(ids) for ids, _, _ in rows)
        batch = {
            "input_ids": torch.tensor([[*ids, *[self.pad_id] * (width - len(ids))] for ids, _, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in rows]),
            "completion_mask": torch.tensor(
                [[0] * before + [1] * (len(ids) - before) + [0] * (width - len(ids)) for ids, before, _ in rows]
            ),
            "starts": torch.tensor([start for _, _, start in rows]),
            "users": torch.tensor([user for _, user, _ in terms]),
            "weights": torch.tensor([weight for _, _, weight in terms]),
            "pairs": torch.tensor([index for index, _, _ in terms]),
        }
        if "reference" in examples[0]:
            batch["reference"] = torch.tensor([list(examples[index]["reference"]) for index, _, _ in terms])
        return batch

    def terms(self, user: int) -> list[tuple[int, float]]:
        """Return the user and the weight of each term of a pair. The user's own term comes first."""
        if user == 0:
            return [(0, 1.0)]
        return [(number, weight) for number, weight in ((user, self.alpha), (0, 1 - self.alpha)) if weight > 0]

    def _row(self, example: Mapping[str, Any], answer: str) -> tuple[list[int], int, int]:
        """Return the ids of a row, the number of ids before its answer, and the place of its first soft token."""
        prompt = list(example["prompt_ids"])
        ids = [*prompt, *example[answer]][: self.max_length]
        roomy = with_room(ids, self.num_soft, bos_id=self.bos_id, filler=self.pad_id)
        # The first token is never scored, because the reference has no soft tokens from which to predict it.
        num_before = min(max(1, len(prompt)), len(ids))
        return roomy, num_before + self.num_soft, soft_start(ids, self.bos_id)


def embedded_rows(model: Any, inputs: Mapping[str, Tensor], soft_MTH: Tensor) -> Tensor:
    """Return the embeddings [R, T, H] of the rows, with the soft tokens of each term in its two rows."""
    soft = [*soft_MTH, *soft_MTH]
    return embedded(model, inputs["input_ids"], soft, inputs["starts"].tolist())
