"""Train a classifier on the answers of two sides, and open a classifier with the base whose hidden states it reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.errors import FileFormatError
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.classifiers.classifier import (
    Classifier,
    ClassifierRecord,
    StatesOf,
    open_classifier,
)
from personalized_soups.scoring.classifiers.held_out import HeldOutReport
from personalized_soups.scoring.classifiers.labelled_texts import LabelledText
from personalized_soups.scoring.classifiers.rows import Floats
from personalized_soups.scoring.classifiers.training import train_classifier

if TYPE_CHECKING:
    from personalized_soups.scoring.hidden_states import HiddenStates


def train_answer_classifier(
    high: Sequence[TextItem],
    low: Sequence[TextItem],
    *,
    states: HiddenStates | None = None,
    keep_length: bool = False,
    seed: int = 0,
) -> tuple[Classifier, HeldOutReport]:
    """Train a classifier on answers of the high and the low end of a dimension.

    The answers may be the base's own, under the instructions of two opposite sides. Take prompts that no other part of
    a study uses. Two classifiers that are trained on answers to different prompts can serve as the scorer that labels
    pairs and as the held-out judge.

    All answers to one prompt are held out together. The best case is two answers to each prompt, one of each end: then
    the subjects of the prompts tell nothing. An answer that is given for both ends is left out.

    Args:
        high: answers of the high end, with their prompts.
        low: answers of the low end, with their prompts.
        states: a base model whose mean hidden states are the features. By default, words are counted.
        keep_length: let the classifier learn the length, for a dimension about length. By default, both ends get the
            same distribution of lengths.
        seed: random seed of the cross-validation.

    Raises:
        InputError: if an end has fewer than 10 different answers or 2 prompts, or the lengths of the two ends hardly
            overlap and the length is not kept.

    Example:
        >>> words = ["door", "lamp", "soup", "cat", "tree", "bread", "sky", "rain", "car", "book"]
        >>> high = [TextItem(f"Tell me about the {word}.", f"I am glad to tell you: a {word}!") for word in words]
        >>> low = [TextItem(f"Tell me about the {word}.", f"Stop asking me about that {word}.") for word in words]
        >>> classifier, report = train_answer_classifier(high, low, keep_length=True)
        >>> classifier.values([("Hi", "I am glad you ask!"), ("Hi", "Stop asking!")]).round().tolist()
        [1.0, 0.0]
    """
    shared = {item.answer for item in high} & {item.answer for item in low}
    texts = [
        LabelledText(item.prompt, item.answer, is_high, item.prompt, f"{name}[{place}]")
        for name, items, is_high in (("high", high, True), ("low", low, False))
        for place, item in enumerate(items)
        if item.answer not in shared
    ]
    return train_text_classifier(texts, states=states, keep_length=keep_length, seed=seed)


def train_text_classifier(
    texts: Sequence[LabelledText],
    *,
    states: HiddenStates | None = None,
    keep_length: bool = False,
    seed: int = 0,
    base: str = "",
) -> tuple[Classifier, HeldOutReport]:
    """Train a classifier on labelled texts, which count words or are read by a base model. See `train_classifier`.

    Args:
        texts: the texts of both classes.
        states: the base model, for hidden states.
        keep_length: let the classifier learn the length.
        seed: random seed of the cross-validation.
        base: the name under which the classifier finds its base again. By default, the place it was loaded from.
    """
    settings: Any = {"keep_length": keep_length, "seed": seed}
    if states is None:
        return train_classifier(texts, **settings)
    about = {"base": base or str(states.model.name_or_path), "dtype": states.dtype, "pooling": states.pooling}
    return train_classifier(
        texts, states_of=_states_function(states), states_digest=states.digest, about=about, **settings
    )


def open_answer_classifier(folder: Path) -> Classifier:
    """Read a classifier. If it reads hidden states, its base is loaded, once for all classifiers of that base.

    Raises:
        FileFormatError: if a file is missing or damaged.
        SoupError: if the base cannot be loaded, or is not the one that the classifier was trained with.
    """
    return open_classifier(folder, states=_opened_states)


def _opened_states(record: ClassifierRecord) -> tuple[StatesOf, str]:
    settings = [record.about.get(key) for key in ("base", "dtype", "pooling")]
    if not all(isinstance(setting, str) for setting in settings):
        raise FileFormatError(
            "the record of the classifier does not name its base, dtype and pooling",
            where="classifier.json: about",
            mend="train the classifier again with psoups scorer train",
        )
    base, dtype, pooling = settings
    states = _states_of_base(base, dtype, pooling)
    return _states_function(states), states.digest


@lru_cache(maxsize=2)
def _states_of_base(base: Any, dtype: Any, pooling: Any) -> HiddenStates:
    from personalized_soups.scoring.hidden_states import HiddenStates

    return HiddenStates.open(base, dtype=dtype, pooling=pooling)


def _states_function(states: HiddenStates) -> StatesOf:
    def states_of(items: Sequence[tuple[str, str]]) -> Floats:
        return states.features([TextItem(prompt, answer) for prompt, answer in items])

    return states_of
