"""`HiddenStates`: the last hidden state of a language model as the features of an answer.

Shapes: N = items, B = rows of a batch, T = tokens of the longest row, H = width of the hidden states.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.devices import resolve_device
from personalized_soups.errors import UsageError
from personalized_soups.generation.loading import Dtype, load_base, load_tokenizer
from personalized_soups.generation.sampling import pad_left
from personalized_soups.generation.special_tokens import num_embeddings, pad_id
from personalized_soups.mixing.fitting import fitting_rows
from personalized_soups.scoring.answer_batches import rows_of_answers
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.encoded_answers import EncodedAnswer, encode_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling: TypeAlias = Literal["last", "mean"]


class HiddenStates:
    """The hidden states of a base model after its last layer, for a prompt with an answer.

    Prompt and answer are encoded as in training, with the end token. The model's output layer is not computed. Values
    have the precision of the model's dtype.

    Attributes:
        pooling: `last` takes the hidden state of the end token, as PReF does. `mean` takes the mean over the tokens of
            the answer.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. It is computed on its device.
        tokenizer: the base's tokenizer.
        pooling: see above.
        batch_size: the maximum number of answers in a forward pass.
        base: the folder or hub id of the model, for the digest. By default, the place from which the model was loaded.

    Raises:
        UsageError: if `batch_size` is less than 1, or the pooling is unknown.

    Example:
        >>> states = HiddenStates.open(TINY_BASE, device="cpu")
        >>> states.features([TextItem("How do I clean a lamp?", "Dust the lamp.")]).shape
        (1, 128)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: Pooling = "last",
        batch_size: int = 64,
        base: Path | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(
                f"batch_size is {batch_size}, but must be at least 1", where="batch_size", mend="give batch_size=64"
            )
        if pooling not in ("last", "mean"):
            raise UsageError(f"unknown pooling {pooling!r}", where="pooling", mend="choose last or mean")
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model = whole
        self._has_adapter = whole is not model
        self._backbone = whole.base_model  # the model without its output layer
        self._tokenizer = tokenizer
        self._base = base or str(whole.name_or_path)
        self._num_embeddings = num_embeddings(whole)
        self._pad_id = pad_id(tokenizer, self._num_embeddings)
        self._batch_size = batch_size
        self.pooling: Pooling = pooling
        whole.eval()

    @classmethod
    def open(
        cls,
        base: Path | str,
        *,
        device: str = "auto",
        dtype: Dtype = "float32",
        pooling: Pooling = "last",
        batch_size: int = 64,
    ) -> Self:
        """Load a base model with its tokenizer.

        Raises:
            SoupError: if the base or the device is missing or not usable.
        """
        model = load_base(base, device=resolve_device(device), dtype=dtype)
        return cls(model, load_tokenizer(base), pooling=pooling, batch_size=batch_size, base=base)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self._backbone.device
        return device

    @property
    def dtype(self) -> Dtype:
        """The name of the model's dtype."""
        name: Dtype = str(self._backbone.dtype).removeprefix("torch.")  # type: ignore[assignment]
        return name

    @cached_property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base.

        Raises:
            InputError: if the place of the base is not known. Then give it as `base`.
        """
        return base_fingerprint(self._base)

    @property
    def model(self) -> Any:
        """The model, with its adapter if it has one."""
        return self._model

    @property
    def digest(self) -> str:
        """A hex digest of the base, its chat template, the dtype, the pooling and the values of an adapter."""
        parts = {
            "kind": "hidden states 1",
            "base": self.base_fingerprint,
            "template": self._tokenizer.chat_template,
            "dtype": str(self._backbone.dtype),
            "pooling": self.pooling,
        }
        if self._has_adapter:
            parts["adapter"] = self._adapter_digest()
        return str(blake3(json.dumps(parts).encode()).hexdigest())

    def _adapter_digest(self) -> str:
        """Return the digest of the names and values of all parameters that PEFT added, in float32."""
        hasher = blake3()
        for name, parameter in sorted(self._model.named_parameters()):
            if "lora_" in name or parameter.requires_grad:
                hasher.update(f"{name}\0{tuple(parameter.shape)}\0".encode())
                hasher.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return str(hasher.hexdigest())

    def features(
        self, items: Sequence[TextItem], /, *, on_done: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return [N, H], float64, on the CPU: the pooled hidden state of each answer.

        Args:
            items: the prompts with answers. An answer that occurs several times is computed once.
            on_done: called after each batch with the number of different answers that are finished.

        Raises:
            InputError: if a prompt or answer cannot be encoded or is too long for the base.
            RunError: if a batch does not fit on the GPU. The message gives a smaller batch size.
        """
        return rows_of_answers(
            items,
            encode=self.encode,
            num_fitting=lambda _: self._batch_size,
            compute=self._states,
            width=int(self._backbone.config.hidden_size),
            on_done=on_done,
        )

    def _states(self, answers: Sequence[EncodedAnswer]) -> npt.NDArray[np.float64]:
        """Return [B, H], float64, on the CPU: the pooled hidden states of one batch, the longest answer last."""
        longest = partial(len, answers[-1].ids)
        with fitting_rows(self._model, len(answers), longest), torch.no_grad():
            pooled_BH = self.pooled(answers).cpu().double()  # some devices have no float64
        states: npt.NDArray[np.float64] = pooled_BH.numpy()
        return states

    def encode(self, item: TextItem) -> EncodedAnswer:
        """Return the token ids of a prompt with an answer.

        Raises:
            InputError: if it cannot be encoded or is too long for the base.
        """
        most = getattr(self._backbone.config, "max_position_embeddings", None)
        return encode_answer(
            self._tokenizer,
            item.prompt,
            item.answer,
            num_embeddings=self._num_embeddings,
            max_tokens=most if isinstance(most, int) else None,
        )

    def pooled(self, answers: Sequence[EncodedAnswer]) -> Tensor:
        """Return [B, H], float32, on the model's device: the pooled hidden states of one batch. It is differentiable.

        The rows are padded on the left and the padding is masked, so the result does not depend on the other rows, up
        to rounding.
        """
        device = self.device
        ids_BT, mask_BT = pad_left([list(answer.ids) for answer in answers], self._pad_id, device)
        inputs: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
        if "position_ids" in inspect.signature(self._backbone.forward).parameters:
            inputs["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)  # learned positions must not count padding
        states_BTH: Tensor = self._backbone(**inputs).last_hidden_state
        if self.pooling == "last":
            return states_BTH[:, -1].float()
        num_answer_B = torch.tensor([answer.num_answer for answer in answers], device=device)
        width = ids_BT.shape[1]
        is_answer_BT = torch.arange(width, device=device) >= width - num_answer_B[:, None]
        total_BH = torch.where(is_answer_BT[..., None], states_BTH.float(), 0.0).sum(dim=1)
        return total_BH / num_answer_B[:, None]
