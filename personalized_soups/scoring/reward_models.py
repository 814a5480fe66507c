"""`RewardModels`: sequence-classification models of transformers as reward functions.

Shapes: N = items, D = reward models, B = rows of a batch, T = tokens.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from personalized_soups.devices import resolve_device
from personalized_soups.errors import InputError, UsageError
from personalized_soups.generation.loading import Dtype
from personalized_soups.generation.prompts import messages_of, prompt_place, template_faults
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.reward_model_files import load_reward_model, reward_model_digest


class RewardModels:
    """Reward models that others have trained, one reward for each: the single logit of a sequence classifier.

    If a model's tokenizer has a chat template, the template renders prompt and answer as a conversation. Otherwise both
    are encoded as a pair of texts.

    Attributes:
        names: the names of the rewards.

    Args:
        models: the folder or hub id of each reward model, by the name of its reward. The folder of an adapter
            that `train_reward_model` wrote is a reward model, too.
        device: `auto` (CUDA if there is a CUDA device), `cpu`, `cuda`, ...
        dtype: the dtype of the models; `auto` takes the dtype of their files.
        batch_size: the maximum number of answers in a forward pass.

    Raises:
        UsageError: if there are no models, or `batch_size` is less than 1.
        InputError: if a model cannot be loaded.
        FileFormatError: if a model does not have exactly one output.
    """

    def __init__(
        self,
        models: Mapping[str, Path | str],
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
        batch_size: int = 32,
    ) -> None:
        if not models:
            raise UsageError("there are no reward models", where="models", mend="give a folder or hub id for each name")
        if batch_size < 1:
            raise UsageError(
                f"batch_size is {batch_size}, but must be at least 1", where="batch_size", mend="give batch_size=32"
            )
        resolved = resolve_device(device)
        self._models = {name: _loaded(place, resolved, dtype) for name, place in models.items()}
        self._batch_size = batch_size

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rewards."""
        return tuple(self._models)

    @cached_property
    def digest(self) -> str:
        """A hex digest of the models' tensors, chat templates and dtypes.

        Raises:
            InputError: if a file cannot be read.
        """
        parts = [
            [name, reward_model_digest(model.place), model.tokenizer.chat_template, str(model.model.dtype)]
            for name, model in self._models.items()
        ]
        return str(blake3(json.dumps(["reward models 1", *parts]).encode()).hexdigest())

    def features(self, items: Sequence[TextItem], /) -> npt.NDArray[np.float64]:
        """Return [N, D], float64: the logit of each model.

        Raises:
            InputError: if a chat template rejects an item, or an item has more tokens than a model takes.
        """
        columns = [model.rewards(items, self._batch_size) for model in self._models.values()]
        return np.stack(columns, axis=1)


@dataclass(frozen=True, slots=True)
class _RewardModel:
    place: str
    model: Any
    tokenizer: Any

    def rewards(self, items: Sequence[TextItem], batch_size: int) -> npt.NDArray[np.float64]:
        """Return [N], float64: the logit of each item."""
        encoded = [self._encoded(item) for item in items]
        rewards = np.empty(len(items))
        # Texts of similar length share a batch, so that a batch has little padding.
        order = sorted(range(len(items)), key=lambda index: len(encoded[index]["input_ids"]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = self._padded([encoded[index] for index in batch])
            with torch.no_grad():
                logits_B1 = self.model(**inputs).logits
            rewards[batch] = logits_B1[:, 0].float().cpu().numpy()
        return rewards

    def _encoded(self, item: TextItem) -> dict[str, list[int]]:
        where = prompt_place(item.prompt)
        if self.tokenizer.chat_template is not None:
            with template_faults(where):
                messages = [*messages_of(item.prompt), {"role": "assistant", "content": item.answer}]
                text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        else:
            encoded = self.tokenizer(item.prompt, item.answer, verbose=False)
        num, most = len(encoded["input_ids"]), getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(most, int) and num > most:
            raise InputError(
                f"the prompt and the answer have {num} tokens, but the reward model takes at most {most}",
                where=where,
                mend="shorten the prompt or the answer, or use a reward model with a longer context",
            )
        accepted = inspect.signature(self.model.forward).parameters
        return {name: list(ids) for name, ids in encoded.items() if name in accepted}

    def _padded(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return the rows as tensors, padded on the right.

        Decoders take the reward from the last token that is not the padding id. If the padding id is also the end
        token, the text's own end would count as padding. So the padding id is one that no text of the batch has.
        """
        used = {token for row in rows for token in row["input_ids"]}
        pad = self.tokenizer.pad_token_id
        if pad is None or pad in used:
            pad = next(token for token in range(len(used) + 1) if token not in used)
        self.model.config.pad_token_id = pad
        width = max(len(row["input_ids"]) for row in rows)
        filling = {"input_ids": pad}
        return {
            name: torch.tensor(
                [[*row[name], *[filling.get(name, 0)] * (width - len(row[name]))] for row in rows],
                device=self.model.device,
            )
            for name in rows[0]
        }


def _loaded(place: Path | str, device: torch.device, dtype: Dtype) -> _RewardModel:
    model, tokenizer = load_reward_model(place, device=device, dtype=dtype)
    return _RewardModel(str(place), model, tokenizer)
