"""Sample different answers to each prompt, from the base and from soups of random profiles, for a question pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from personalized_soups.declare.side_rule import SideRule
from personalized_soups.users.answers.preferences import experts_by_dimension

if TYPE_CHECKING:
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.scoring.base_rewards import TextItem

# The weight of an expert in a random profile, and how likely a dimension is to have one.
_WEIGHTS = (0.3, 1.0)
_SIDE_SHARE = 2 / 3


def random_profiles(
    experts: Sequence[str], rule: SideRule, count: int, rng: np.random.Generator
) -> list[dict[str, float]]:
    """Return random profiles, with at most one side of each dimension. Each profile has at least one expert.

    Args:
        experts: the names of the experts.
        rule: knows the dimension of each expert. An expert without a dimension has one of its own.
        count: the number of profiles.
        rng: the generator of random numbers.
    """
    groups = [[experts[index] for index in members] for members in experts_by_dimension(experts, rule).values()]
    profiles = []
    for _ in range(count):
        chosen = [group for group in groups if rng.random() < _SIDE_SHARE] or [groups[int(rng.integers(len(groups)))]]
        profiles.append({group[int(rng.integers(len(group)))]: float(rng.uniform(*_WEIGHTS)) for group in chosen})
    return profiles


def sample_candidates(
    model: SoupModel,
    prompts: Sequence[str],
    *,
    answers_per_prompt: int,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    whole_sentences: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> list[TextItem]:
    """Return different answers to each prompt, in the order of the prompts.

    The first answer to a prompt is from the base. The others are from soups of random profiles: rows of one batch have
    different profiles, so the answers differ in every dimension. Empty answers are left out, and so are answers that
    repeat an earlier one to the same prompt.

    Args:
        model: the base with the experts.
        prompts: different prompts.
        answers_per_prompt: the number of answers to sample for each prompt.
        temperature: greater than 0.
        top_p: sample from the most likely tokens that have this share of the probability. Rare tokens make answers that
            nobody would write, and the choice of informative pairs would pick just these answers.
        max_new_tokens: the maximum number of tokens of an answer.
        batch_size: the number of answers that are sampled at once.
        seed: the seed of the profiles and of the sampling. The answers depend on `batch_size`, too.
        whole_sentences: what happens to an answer that reaches `max_new_tokens` and so lacks its end: with True, it is
            kept without its last sentence, which is cut off; with False, it is left out. One sentence alone is left
            out, too.
        on_done: called after each batch with the number of answers that are sampled.

    Raises:
        SoupError: if `SoupModel.generate` raises it.
    """
    from personalized_soups.scoring.base_rewards import TextItem
    from personalized_soups.scoring.encoded_answers import encode_answer
    from personalized_soups.scoring.sentences import ends, without_cut_sentence

    rows = [prompt for prompt in prompts for _ in range(answers_per_prompt)]
    rng = np.random.default_rng([seed, 0])
    drawn = random_profiles(list(model.experts), SideRule.of(model.experts.values()), len(rows), rng)
    profiles = [None if row % answers_per_prompt == 0 else profile for row, profile in enumerate(drawn)]
    # Prompts of similar length share a batch, so that a batch has little padding.
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    texts = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        answers = model.generate(
            [rows[row] for row in batch],
            [profiles[row] for row in batch],
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            # Every batch has its own random numbers.
            seed=seed + (start << 32),
        )
        for row, answer in zip(batch, answers, strict=True):
            texts[row] = answer
        if on_done is not None:
            on_done(start + len(batch))
    tokenizer = model.generator.tokenizer
    items = dict.fromkeys(TextItem(prompt, text) for prompt, text in zip(rows, texts, strict=True) if text)
    kept: dict[TextItem, None] = {}
    for item in items:
        # An answer that ended has its tokens and an end token, which `encode_answer` counts too.
        if encode_answer(tokenizer, *item).num_answer <= max_new_tokens:
            kept[item] = None
        elif whole_sentences and ends(text := without_cut_sentence(item.answer)):
            kept[TextItem(item.prompt, text)] = None
    return list(kept)
