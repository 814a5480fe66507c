"""`ImplicitRewards`: each expert of a SoupModel as a reward function.

Training by DPO makes a policy an implicit reward model (Rafailov et al. 2023, arXiv:2305.18290, section 4): the reward
that it has learned is `beta (log pi_e(y|x) - log pi_0(y|x))`, up to a term that depends only on the prompt x.

Shapes: N = items, E = experts, B = rows of a batch, K = tokens of the longest answer, V = vocabulary size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.library import Expert
from personalized_soups.errors import UsageError, choose_from
from personalized_soups.mixing.fitting import fitting_rows
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.answer_batches import Item, rows_of_answers
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.encoded_answers import EncodedAnswer, encode_answer
from personalized_soups.scoring.expert_digests import expert_digest
from personalized_soups.scoring.log_probs import answer_log_probs

# The most memory that the logits of one batch take, unless a single row takes more.
_LOGITS_BYTES = 1 << 29


class MeasuredAnswers(NamedTuple):
    """The rewards of answers, and a sign of broken text.

    Attributes:
        rewards: [N, E], float64.
        least_log_probs: [N], float64: the log-probability of the answer's least likely token under the base. A broken
            sentence has a token that the base finds very unlikely, wherever the rest of the answer is likely.
    """

    rewards: npt.NDArray[np.float64]
    least_log_probs: npt.NDArray[np.float64]


class ImplicitRewards:
    """The rewards that experts have learned: `beta_e (log pi_e(y|x) - log pi_0(y|x))` for each expert e.

    `pi_e` is the base with expert e at weight 1, and `pi_0` is the base alone. The base and all experts are computed in
    mixed batches. Prompt and answer are encoded as in training, with the end token.

    The rewards have the precision of the model's dtype. In bfloat16, log-probabilities have errors of about 0.01 a
    token, so use a model in float32 where memory allows.

    Attributes:
        names: the names of the experts.
        betas: the beta of each expert, by name.
        length_normalized: whether a reward is divided by the number of the answer's tokens.

    Args:
        model: the base with the experts. It needs a tokenizer.
        experts: the names of the experts to use. By default, all experts are used.
        beta: one beta for all experts, or one for each by name. By default, an expert's beta is that of the recipe in
            its expert.json, or 1 if there is none.
        length_normalized: divide each reward by the number of the answer's tokens, with the end token.
        batch_size: the maximum number of rows in a forward pass. An answer takes a row for the base and for each
            expert. Batches are smaller if their logits would take more than 512 MiB.
        base: the folder or hub id of the base, for the digest. By default, the place from which the model was loaded.

    Raises:
        UsageError: if there is no expert, an expert is unknown, or `beta` or `batch_size` is not greater than 0.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> rewards = ImplicitRewards(model)
        >>> rewards.features([TextItem("How do I clean a lamp?", "Dust the lamp.")]).shape
        (1, 6)
    """

    def __init__(
        self,
        model: SoupModel,
        *,
        experts: Sequence[str] | None = None,
        beta: float | Mapping[str, float] | None = None,
        length_normalized: bool = False,
        batch_size: int = 64,
        base: Path | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(
                f"batch_size is {batch_size}, but must be at least 1", where="batch_size", mend="give batch_size=64"
            )
        self._model = model
        self._experts = _chosen(model, experts)
        self.betas = _betas(self._experts, beta)
        self.length_normalized = length_normalized
        self._batch_size = batch_size
        self._base = base

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the experts."""
        return tuple(self._experts)

    @cached_property
    def expert_digests(self) -> dict[str, str]:
        """The digest of each expert's files, by the expert's name.

        Raises:
            InputError: if a file cannot be read.
        """
        return {name: expert_digest(expert.folder) for name, expert in self._experts.items()}

    @cached_property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base.

        Raises:
            InputError: if the place of the base is not known. Then give it as `base`.
        """
        return base_fingerprint(self._base or str(self._model.model.name_or_path))

    @cached_property
    def digest(self) -> str:
        """A hex digest of the experts' files, the betas, the base, its chat template, the dtype and the options.

        Raises:
            InputError: if a file cannot be read, or the place of the base is not known.
        """
        parts = {
            "kind": "implicit rewards 1",
            "experts": [[name, self.expert_digests[name], self.betas[name]] for name in self.names],
            "base": self.base_fingerprint,
            "template": self._model.generator.tokenizer.chat_template,
            "dtype": str(self._model.dtype),
            "length_normalized": self.length_normalized,
        }
        return str(blake3(json.dumps(parts).encode()).hexdigest())

    def features(
        self, items: Sequence[TextItem], /, *, on_done: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return [N, E], float64: the reward of each answer from each expert.

        Args:
            items: the prompts with answers. An answer that occurs several times is computed once.
            on_done: called after each batch with the number of different answers that are finished.

        Raises:
            InputError: if a prompt or answer cannot be encoded or is too long for the base.
            RunError: if a batch does not fit on the GPU. The message gives a smaller batch size.
            UsageError: if an expert of the model was replaced or removed since this object was made.
        """
        return self.measured(items, on_done=on_done).rewards

    def measured(
        self, items: Sequence[TextItem], /, *, on_done: Callable[[int], None] | None = None
    ) -> MeasuredAnswers:
        """Return the rewards of each answer, and how unlikely its least likely token is under the base.

        Arguments and errors are those of `features`.
        """
        table = self._rows(items, self._encoded, on_done)
        return MeasuredAnswers(table[:, :-1], table[:, -1])

    def encoded_features(
        self, answers: Sequence[EncodedAnswer], /, *, on_done: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return [N, E], float64: the reward of each answer from each expert, for answers that are token ids.

        Arguments and errors are those of `features`.
        """
        return self._rows(answers, lambda answer: answer, on_done)[:, :-1]

    def _rows(
        self, items: Sequence[Item], encode: Callable[[Item], EncodedAnswer], on_done: Callable[[int], None] | None
    ) -> npt.NDArray[np.float64]:
        self._check_experts()
        return rows_of_answers(
            items,
            encode=encode,
            num_fitting=self._num_fitting,
            compute=self._batch,
            width=len(self.names) + 1,
            on_done=on_done,
        )

    def _batch(self, answers: Sequence[EncodedAnswer]) -> npt.NDArray[np.float64]:
        """Return [N, E + 1] for one batch of answers: the rewards, and the base's least log-probability of a token."""
        policies: list[str | None] = [None, *self.names]
        # All policies share a forward pass, unless a single answer has more policies than a batch has rows.
        num_policies = max(1, self._max_rows(max(answer.num_answer for answer in answers)) // len(answers))
        width = max(len(answer.ids) for answer in answers)
        model, pad_id = self._model, self._model.generator.pad_id
        parts: list[npt.NDArray[np.float64]] = []
        least_N: npt.NDArray[np.float64] | None = None
        for start in range(0, len(policies), num_policies):
            chosen = policies[start : start + num_policies]
            with (
                fitting_rows(model.model, len(chosen) * len(answers), lambda: width),
                model.mixture(chosen, rows_each=len(answers)),
            ):
                log_probs = answer_log_probs(model.model, answers, pad_id, repeats=len(chosen))
            parts.append(log_probs.total.numpy())
            least_N = log_probs.least[0].numpy() if least_N is None else least_N
        log_probs_PN = np.concatenate(parts)
        betas_E = np.array([self.betas[name] for name in self.names])
        rewards_NE = (log_probs_PN[1:] - log_probs_PN[0]).T * betas_E
        if self.length_normalized:
            rewards_NE /= np.array([[answer.num_answer] for answer in answers])
        assert least_N is not None  # the base is the first policy
        return np.column_stack([rewards_NE, least_N])

    def _num_fitting(self, answers: Sequence[EncodedAnswer]) -> int:
        """Return how many of the next answers fit in one batch, at least 1."""
        longest, count = 0, 0
        for answer in answers:
            longest = max(longest, answer.num_answer)
            if count and (count + 1) * (1 + len(self.names)) > self._max_rows(longest):
                break
            count += 1
        return count

    def _max_rows(self, longest: int) -> int:
        """Return the maximum number of rows in a batch whose longest answer has `longest` tokens."""
        vocabulary = self._model.generator.num_embeddings or 1
        row_bytes = (longest + 1) * vocabulary * int(self._model.dtype.itemsize)
        return min(self._batch_size, max(1, _LOGITS_BYTES // row_bytes))

    def _encoded(self, item: TextItem) -> EncodedAnswer:
        generator = self._model.generator
        most = getattr(self._model.model.config, "max_position_embeddings", None)
        return encode_answer(
            generator.tokenizer,
            item.prompt,
            item.answer,
            num_embeddings=generator.num_embeddings,
            max_tokens=most if isinstance(most, int) else None,
        )

    def _check_experts(self) -> None:
        changed = [name for name, expert in self._experts.items() if self._model.experts.get(name) is not expert]
        if changed:
            raise UsageError(
                f"experts of the model were replaced or removed: {', '.join(changed)}",
                where="model",
                mend="make a new ImplicitRewards with the model",
            )


def _chosen(model: SoupModel, names: Sequence[str] | None) -> dict[str, Expert]:
    chosen = list(model.experts) if names is None else list(names)
    for name in chosen:
        if name not in model.experts:
            raise UsageError(
                f"no expert is called {name!r}", where="experts", mend=choose_from(name, list(model.experts))
            )
    if not chosen:
        raise UsageError("there are no experts", where="experts", mend="give a model with at least one expert")
    return {name: model.experts[name] for name in chosen}


def _betas(experts: Mapping[str, Expert], beta: float | Mapping[str, float] | None) -> dict[str, float]:
    if isinstance(beta, Mapping):
        missing = [name for name in experts if name not in beta]
        if missing:
            raise UsageError(
                f"no beta is given for the experts {', '.join(missing)}",
                where="beta",
                mend="give a beta for each expert, or a single number for all experts",
            )
        betas = {name: float(beta[name]) for name in experts}
    else:
        betas = {name: _beta_of(expert) if beta is None else float(beta) for name, expert in experts.items()}
    for name, value in betas.items():
        if not 0 < value < np.inf:
            raise UsageError(
                f"the beta of {name!r} is {value:g}, but must be a finite number greater than 0",
                where="beta",
                mend="give a number such as beta=0.1",
            )
    return betas


def _beta_of(expert: Expert) -> float:
    """Return the beta with which an expert was trained, or 1 if its record does not say."""
    recipe = {} if expert.record is None else expert.record.recipe
    dpo = recipe.get("dpo")
    value = dpo.get("beta") if isinstance(dpo, Mapping) else None
    return float(value) if isinstance(value, int | float) else 1.0
