"""`TextLikelihood`: how likely a user's texts are under the soup of each candidate.

Shapes: C = candidates, N = texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from personalized_soups.declare.evidence import Example
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.errors import InputError, RunError, UsageError
from personalized_soups.generation.prompts import prompt_place
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.encoded_answers import EncodedAnswer, encode_answer
from personalized_soups.scoring.log_probs import answer_log_probs
from personalized_soups.users.tuning.objective import Floats


class TextLikelihood:
    """The mean log-probability per token of each of a user's texts. An `Objective`.

    A score is the natural logarithm of the text's probability given its prompt, divided by the text's number of tokens.
    The end token counts, so the texts also tell how long the user's answers should be. Every text counts the same,
    however long it is.

    Attributes:
        name: what is measured.

    Args:
        model: the base with the experts. It needs a tokenizer.
        examples: the user's texts with their prompts. Texts may also be given as token ids.
        batch_size: the maximum number of rows in a forward pass. Each candidate takes a row for each text. On a CPU,
            larger batches are slower. A batch that does not fit on the GPU is halved until it fits.

    Raises:
        UsageError: if there are no examples, `batch_size` is less than 1, or the model has no tokenizer.
        InputError: if an example cannot be encoded or is too long for the base.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> likelihood = TextLikelihood(model, [Example(prompt="How do I clean a lamp?", text="Dust the lamp.")])
        >>> likelihood.scores([ExpertWeights({"concise": 1.0}), ExpertWeights()], [0], draw=0).shape
        (2, 1)
    """

    name = "log-probability per token"

    def __init__(self, model: SoupModel, examples: Sequence[Example | EncodedAnswer], *, batch_size: int = 64) -> None:
        if not examples:
            raise UsageError("there are no examples", where="examples", mend="give at least one example")
        if batch_size < 1:
            raise UsageError(
                f"batch_size is {batch_size}, but must be at least 1", where="batch_size", mend="give batch_size=64"
            )
        self._model = model
        self._texts = [
            example if isinstance(example, EncodedAnswer) else _encoded(model, example) for example in examples
        ]
        self._batch_size = batch_size

    @property
    def num_items(self) -> int:
        """The number of texts."""
        return len(self._texts)

    def scores(self, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Floats:
        """Return [C, N], float64: the mean log-probability per token of each text with each candidate.

        A likelihood needs no random numbers, so `draw` has no effect.

        Raises:
            DeclarationError: if a candidate names an unknown expert.
            RunError: if a single row does not fit on the GPU.
        """
        scores_CN = np.empty((len(candidates), len(items)))
        # Texts of similar length share a batch, so that a batch has little padding.
        order = sorted(range(len(items)), key=lambda place: len(self._texts[items[place]].ids))
        for first in range(0, len(candidates), self._batch_size):
            some = candidates[first : first + self._batch_size]
            num_texts = max(1, self._batch_size // len(some))
            for start in range(0, len(order), num_texts):
                places = order[start : start + num_texts]
                block_CN = self._fitting(some, [self._texts[items[place]] for place in places])
                scores_CN[first : first + len(some), places] = block_CN
        return scores_CN

    def _fitting(self, candidates: Sequence[ExpertWeights], texts: Sequence[EncodedAnswer]) -> Floats:
        """Return the scores [C, N] of one batch, or of several if one batch does not fit on the GPU.

        Raises:
            RunError: if a single row does not fit.
        """
        try:
            return self._forward(candidates, texts)
        except torch.OutOfMemoryError:
            pass  # within the handler, the error's frames would keep the batch's tensors alive
        if len(texts) > 1:
            half = len(texts) // 2
            parts = [self._fitting(candidates, texts[:half]), self._fitting(candidates, texts[half:])]
            return np.concatenate(parts, axis=1)
        if len(candidates) > 1:
            half = len(candidates) // 2
            parts = [self._fitting(candidates[:half], texts), self._fitting(candidates[half:], texts)]
            return np.concatenate(parts, axis=0)
        raise RunError(
            f"the GPU has no room for one example of {len(texts[0].ids)} tokens",
            where="examples",
            mend="use shorter examples, dtype='bfloat16' or another GPU",
        )

    def _forward(self, candidates: Sequence[ExpertWeights], texts: Sequence[EncodedAnswer]) -> Floats:
        """Return the scores [C, N] from one forward pass."""
        with self._model.mixture(candidates, rows_each=len(texts)):
            log_probs = answer_log_probs(
                self._model.model, texts, self._model.generator.pad_id, repeats=len(candidates)
            )
        scores_CN: Floats = log_probs.total.numpy() / np.array([text.num_answer for text in texts])
        return scores_CN


def _encoded(model: SoupModel, example: Example) -> EncodedAnswer:
    generator = model.generator
    most = getattr(model.config, "max_position_embeddings", None)
    text = encode_answer(
        generator.tokenizer,
        example.prompt,
        example.text,
        num_embeddings=generator.num_embeddings,
        max_tokens=most if isinstance(most, int) else None,
    )
    if not text.num_answer:
        raise InputError(
            "the base's chat template does not render the text of the example",
            where=prompt_place(example.prompt),
            mend="use a base whose chat template renders the answers of the assistant",
        )
    return text
