"""Read the statements of a trait, and split them so that no paraphrase of a training statement is held out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personalized_soups.errors import FileFormatError, InputError

Bools = npt.NDArray[np.bool_]

# Two statements whose words overlap by at least this (Jaccard) count as paraphrases of each other.
SAME_WORDS = 0.5

SOURCE = "https://github.com/anthropics/evals/tree/main/persona"
QUESTION = "Answer Yes or No: would you say this?"
_WORD = re.compile(r"[a-z']+")
_COMMON_WORDS = frozenset({
    "a", "about", "am", "an", "and", "are", "as", "at", "be", "because", "been", "but", "by", "can", "could", "do",
    "does", "for", "from", "get", "had", "has", "have", "i", "if", "in", "into", "is", "it", "its", "just", "like",
    "me", "more", "most", "my", "not", "of", "on", "one", "or", "other", "others", "people", "so", "some", "than",
    "that", "the", "their", "them", "there", "they", "things", "this", "to", "very", "was", "way", "what", "when",
    "which", "who", "will", "with", "would", "you",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement that a person with the trait would agree with or not.

    Attributes:
        text: the statement.
        agrees: whether a person with the trait says Yes.
    """

    text: str
    agrees: bool

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The chat that asks for Yes or No.

        With the data's own question and the base's default system message, prompts have half as many tokens again, and
        SmolLM2-135M-Instruct tells the two kinds of statements apart less well: AUC .49 instead of .78 for extraversion
        and .44 instead of .77 for risk-averse.
        """
        return [{"role": "system", "content": QUESTION}, {"role": "user", "content": self.text}]

    def answer(self, *, has_trait: bool) -> str:
        """Return the answer of a person with the trait, or of a person with its opposite."""
        return "Yes" if self.agrees == has_trait else "No"


@dataclass(frozen=True, slots=True)
class TraitSplit:
    """The statements of one trait. A person with the trait says Yes to half of each part.

    Attributes:
        train: for training experts.
        validation: for choosing weights and methods.
        test: for the tables.
    """

    train: tuple[Statement, ...]
    validation: tuple[Statement, ...]
    test: tuple[Statement, ...]


def read_statements(folder: Path, trait: str) -> list[Statement]:
    """Return the statements of `FOLDER/TRAIT.jsonl`, each once, in the file's order.

    Raises:
        InputError: if the file is missing or cannot be read.
        FileFormatError: if a line is not an object with a `statement` and an `answer_matching_behavior` of Yes or No.
    """
    path = folder / f"{trait}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(
            f"the statements can't be read: {fault}",
            where=str(path),
            mend=f"check the folder and the trait's name; the files come from {SOURCE}",
        ) from fault
    statements = [_statement(line, f"{path}:{at}") for at, line in enumerate(lines, start=1) if line.strip()]
    return list(dict.fromkeys(statements))


def _statement(line: str, where: str) -> Statement:
    try:
        row = json.loads(line)
        text, answer = row["statement"], row["answer_matching_behavior"].strip()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = answer = None
    if not isinstance(text, str) or not text.strip() or answer not in {"Yes", "No"}:
        raise FileFormatError(
            "the line is not a JSON object with a `statement` and the answer Yes or No in `answer_matching_behavior`",
            where=where,
            mend=f"copy the file again from {SOURCE}",
        )
    return Statement(text, answer == "Yes")


def paraphrases(texts: Sequence[str], threshold: float = SAME_WORDS) -> Bools:
    """Return which texts are paraphrases of each other: [N, N], bool. A text is no paraphrase of itself.

    Two texts are paraphrases if the Jaccard overlap of their words, without the commonest English words, is at least
    `threshold`.

    Args:
        texts: the N texts.
        threshold: the least overlap, in (0, 1].
    """
    words = [frozenset(_WORD.findall(text.lower())) - _COMMON_WORDS for text in texts]
    column = {word: at for at, word in enumerate(sorted(frozenset().union(*words)))}
    has_NW = np.zeros(
        (len(texts), len(column)), dtype=np.float32
    )  # float32 counts words exactly, and is a fast product
    for row, own in enumerate(words):
        has_NW[row, [column[word] for word in own]] = 1
    common_NN = has_NW @ has_NW.T
    sizes_N = has_NW.sum(1)
    union_NN = sizes_N[:, None] + sizes_N - common_NN
    same_NN: Bools = (union_NN > 0) & (common_NN >= threshold * union_NN)
    np.fill_diagonal(same_NN, val=False)
    return same_NN


def split_statements(
    statements: Sequence[Statement], *, num_train: int, num_validation: int, num_test: int, seed: int
) -> TraitSplit:
    """Split the statements of a trait at random, without paraphrases across the parts.

    A statement that is a paraphrase of a test statement is in neither of the other parts. A statement that is a
    paraphrase of a validation statement is not in the training part.

    Args:
        statements: the statements of one trait.
        num_train, num_validation, num_test: the number of statements of each part. They must be even.
        seed: random seed of the split.

    Raises:
        InputError: if too few statements are left for a part.
    """
    same_NN = paraphrases([statement.text for statement in statements])
    order = list(range(len(statements)))
    random.Random(f"persona/{seed}").shuffle(order)
    parts: list[tuple[Statement, ...]] = []
    for name, size in (("test", num_test), ("validation", num_validation), ("training", num_train)):
        halves = [[index for index in order if statements[index].agrees == yes][: size // 2] for yes in (True, False)]
        if min(map(len, halves)) < size // 2:
            raise InputError(
                f"too few of the {len(statements)} statements are left for the {name} part, because paraphrases of "
                "held-out statements are left out",
                where="statements",
                mend="ask for fewer statements in a part",
            )
        chosen = sorted(index for half in halves for index in half)
        # Yes and No alternate at random, so that every batch of a training has both.
        random.Random(f"persona/{name}/{seed}").shuffle(chosen)
        parts.append(tuple(statements[index] for index in chosen))
        taken = np.zeros(len(statements), dtype=bool)
        taken[chosen] = True
        order = [index for index in order if not taken[index] and not (same_NN[index] & taken).any()]
    test, validation, train = parts
    return TraitSplit(train, validation, test)
