"""The log-probabilities of answers under a causal language model, with bounded memory for logits.

Shapes: B = rows of a batch, T = tokens of the longest row, K = tokens of the longest answer, V = vocabulary size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from personalized_soups.generation.sampling import pad_left
from personalized_soups.scoring.encoded_answers import EncodedAnswer

# The number of logits that are held a second time, in float32.
_CHUNK = 1 << 24


class AnswerLogProbs(NamedTuple):
    """The log-probabilities of answers, given their prompts.

    Attributes:
        total: [repeats, answers], float64, on the CPU: the sum over the answer's tokens.
        least: [repeats, answers], float64, on the CPU: the log-probability of the answer's least likely token.
        squares: [repeats, answers], float64, on the CPU: the sum of the squares over the answer's tokens.
    """

    total: Tensor
    least: Tensor
    squares: Tensor


def answer_log_probs(model: Any, answers: Sequence[EncodedAnswer], pad_id: int, *, repeats: int = 1) -> AnswerLogProbs:
    """Return the log-probability of each answer given its prompt, and that of its least likely token.

    The rows are padded on the left, so that all answers end in the last column, and the model computes logits for the
    last K positions only. Log-probabilities of tokens are computed in float32 from logits of the model's dtype.

    Args:
        model: a causal language model of transformers, called as it is: within a mixture, if one is set.
        answers: the prompts with answers, as token ids.
        pad_id: an id that pads shorter rows. It is masked.
        repeats: how many times the model computes the answers: the batch is the answers, `repeats` times in a row.
    """
    device = model.device
    ids_BT, mask_BT = pad_left([list(answer.ids) for answer in answers], pad_id, device)
    num_answer_B = torch.tensor([answer.num_answer for answer in answers], device=device)
    longest = int(num_answer_B.max())
    inputs: dict[str, Any] = {
        "input_ids": ids_BT.repeat(repeats, 1),
        "attention_mask": mask_BT.repeat(repeats, 1),
        "use_cache": False,
    }
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:  # models with learned positions would count the padding
        inputs["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0).repeat(repeats, 1)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = longest + 1
    with torch.no_grad():
        logits_BKV = model(**inputs).logits[:, -(longest + 1) : -1]
        token_log_probs_BK = _of_tokens(logits_BKV, inputs["input_ids"][:, -longest:])
    is_answer_BK = torch.arange(longest, device=device) >= longest - num_answer_B[:, None]
    # Sums are computed on the CPU, because some devices have no float64.
    # A masked position has the log-probability 0, which changes neither the sums nor the minimum.
    kept_BK = token_log_probs_BK.masked_fill(~is_answer_BK.repeat(repeats, 1), 0.0).cpu().double()
    shape = (repeats, len(answers))
    sums = (kept_BK.sum(-1), kept_BK.amin(-1), kept_BK.square().sum(-1))
    return AnswerLogProbs(*(sum_B.view(shape) for sum_B in sums))


def _of_tokens(logits_BKV: Tensor, ids_BK: Tensor) -> Tensor:
    """Return [B, K], float32: the log-probability of each token. Only some positions are converted at a time."""
    rows, positions, vocabulary = logits_BKV.shape
    step = max(1, _CHUNK // (rows * vocabulary))
    parts = []
    for start in range(0, positions, step):
        part_BPV = logits_BKV[:, start : start + step].float()
        chosen_BP1 = part_BPV.gather(-1, ids_BK[:, start : start + step, None])
        parts.append(chosen_BP1[..., 0] - part_BPV.logsumexp(-1))
    return torch.cat(parts, dim=1)
