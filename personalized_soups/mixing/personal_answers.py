"""Answer prompts with personal models. Soups, private adapters and soft tokens of different users share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.adapters.library import Expert
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.errors import UsageError
from personalized_soups.generation.prompts import Prompt, prompt_text, with_text_before
from personalized_soups.mixing.batch_rows import checked_prompts
from personalized_soups.mixing.model import SoupModel
from personalized_soups.mixing.personal_model import BestOf, MixLogProbs, PersonalModel

# The sampled answers to one prompt have places that differ by this number. So the first of them has the random numbers
# of a plain answer, and no answer has those of another prompt.
_BETWEEN_SAMPLES = 1 << 32


def answer(
    model: SoupModel,
    prompts: str | Sequence[Prompt],
    personal_models: PersonalModel | Sequence[PersonalModel],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    places: Sequence[int] | None = None,
    max_adapters: int = 32,
) -> list[str]:
    """Answer each prompt with its own personal model, `batch_size` answers at a time.

    Rows with soups, private adapters and soft tokens share a batch. An answer depends only on its prompt, its personal
    model, the seed and the prompt's place (up to rounding, which depends on the batch).

    Args:
        model: the base with its experts. A private adapter is added to it while its users are answered, unless the
            model already holds an expert with the adapter's folder.
        prompts: a text, or a list of texts and chats.
        personal_models: one personal model for each prompt, or a single one for all prompts.
        max_new_tokens: the maximum number of tokens of an answer.
        temperature: as for `SoupModel.generate`. `BestOf` needs a temperature above 0.
        seed: the seed of the sampling.
        batch_size: the number of answers that are generated at once.
        places: the place of each prompt in a longer list of which `prompts` is a part.
        max_adapters: the maximum number of private adapters in memory. If there are more, the prompts are answered in
            groups.

    Returns:
        One text for each prompt.

    Raises:
        UsageError: if the numbers of prompts and personal models differ, `BestOf` is combined with temperature 0, a
            profile names the private adapter too, soft tokens do not fit the base, or this thread has set a mixture
            and there are private adapters to add.
        SoupError: in the same cases as `SoupModel.generate`, and if a private adapter cannot be added to the model.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> prompts = ["How do I clean a lamp?"] * 2
        >>> answers = answer(model, prompts, [PersonalModel(), PersonalModel({"concise": 0.6})], max_new_tokens=4)
        >>> len(answers)
        2
    """
    users = _users(checked_prompts(prompts), personal_models, places)
    if temperature == 0 and any(isinstance(user.model.decoder, BestOf) for user in users):
        raise UsageError(
            "the temperature is 0, at which all sampled answers are equal, but a personal model has the decoder BestOf",
            where="temperature",
            mend="give a temperature above 0, such as temperature=0.7, or use the decoder Plain()",
        )
    answers = [""] * len(users)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for same_size in _mixed_by_size(users):
        texts = _answer_mixed(model, [users[index] for index in same_size], batch_size=batch_size, **sampling)
        for index, text in zip(same_size, texts, strict=True):
            answers[index] = text
    for group in _groups(users, max_adapters):
        with _held(model, [users[index].model.adapter_folder for index in group]) as names:
            chosen = _answer_group(
                model,
                [users[index] for index in group],
                names,
                batch_size=batch_size,
                **sampling,
            )
        for index, text in zip(group, chosen, strict=True):
            answers[index] = text
    return answers


@dataclass(frozen=True, slots=True)
class _User:
    prompt: Prompt
    model: PersonalModel
    place: int

    @property
    def num_answers(self) -> int:
        decoder = self.model.decoder
        return decoder.num_answers if isinstance(decoder, BestOf) else 1

    def best(self, answers: Sequence[str]) -> str:
        """Return the answer that the decoder chooses."""
        decoder = self.model.decoder
        if not isinstance(decoder, BestOf):
            return answers[0]
        prompt = prompt_text(self.prompt)
        rewards = [decoder.reward(prompt, text) for text in answers]
        return answers[rewards.index(max(rewards))]


def _users(
    prompts: Sequence[Prompt], models: PersonalModel | Sequence[PersonalModel], places: Sequence[int] | None
) -> list[_User]:
    if not prompts:
        raise UsageError("there are no prompts", where="prompts", mend="give at least one prompt")
    listed = [models] * len(prompts) if isinstance(models, PersonalModel) else list(models)
    for name, given in (("personal_models", listed), ("places", prompts if places is None else places)):
        if len(given) != len(prompts):
            raise UsageError(
                f"{name} has {len(given)} entries, but the number of prompts is {len(prompts)}",
                where=name,
                mend="give one entry for each prompt",
            )
    own = range(len(prompts)) if places is None else places
    return [_User(*user) for user in zip(prompts, listed, own, strict=True)]


def _groups(users: Sequence[_User], max_adapters: int) -> Iterator[list[int]]:
    """Yield the indices of the users of each group. A group has at most `max_adapters` different private adapters."""
    folders = dict.fromkeys(user.model.adapter_folder for user in users)
    folders.pop(None, None)
    group_of = {folder: number // max(1, max_adapters) for number, folder in enumerate(folders)}
    groups: dict[int, list[int]] = {}
    for index, user in enumerate(users):
        if not isinstance(user.model.decoder, MixLogProbs):
            groups.setdefault(group_of.get(user.model.adapter_folder, 0), []).append(index)
    yield from groups.values()


def _mixed_by_size(users: Sequence[_User]) -> Iterator[list[int]]:
    """Yield the indices of the users whose log-probabilities are mixed, those with equally many soups together."""
    by_size: dict[int, list[int]] = {}
    for index, user in enumerate(users):
        if isinstance(user.model.decoder, MixLogProbs):
            by_size.setdefault(len(user.model.decoder.parts), []).append(index)
    yield from by_size.values()


def _answer_mixed(model: SoupModel, users: Sequence[_User], **sampling: Any) -> list[str]:
    """Return the answer of each user. All users have `MixLogProbs` with equally many soups."""
    rows = []
    for user in users:
        assert isinstance(user.model.decoder, MixLogProbs)
        if user.model.adapter is not None or user.model.profile is not None:
            raise UsageError(
                "a personal model has MixLogProbs, which names its own soups, but also a profile or an adapter",
                where="decoder",
                mend="name the soups in MixLogProbs alone",
            )
        rows += [(user, profile, weight) for profile, weight in user.model.decoder.parts.items()]
    texts: list[str] = model.generate(
        [with_text_before(user.prompt, user.model.text) for user, _, _ in rows],
        [profile for _, profile, _ in rows],
        soft_tokens=[user.model.soft_tokens for user, _, _ in rows],
        places=[user.place for user, _, _ in rows],
        log_prob_weights=[weight for _, _, weight in rows],
        **sampling,
    )
    return texts[:: len(rows) // len(users)]


@contextmanager
def _held(model: SoupModel, adapters: Sequence[Path | None]) -> Iterator[dict[Path, str]]:
    """Within the block, the model holds these private adapters as experts. Yield the name of each resolved folder."""
    wanted = {folder: None for folder in adapters if folder is not None}
    by_folder = {expert.folder.resolve(): name for name, expert in model.experts.items()}
    names = {folder: by_folder[folder] for folder in wanted if folder in by_folder}
    taken = {*model.experts, *model.profiles}
    added: list[Expert] = []
    for folder in wanted:
        if folder not in names:
            names[folder] = next(name for name in _private_names() if name not in taken)
            taken.add(names[folder])
            added.append(Expert(names[folder], folder))
    if not added:
        yield names
        return
    model.experts.change(added)
    try:
        yield names
    finally:
        model.experts.change([], [expert.name for expert in added])


def _private_names() -> Iterator[str]:
    number = 1
    while True:
        yield f"private-adapter-{number}"
        number += 1


def _answer_group(model: SoupModel, users: Sequence[_User], names: dict[Path, str], **sampling: Any) -> list[str]:
    """Return the chosen answer of each user. The model holds the private adapters under `names`."""
    owners = [index for index, user in enumerate(users) for _ in range(user.num_answers)]
    samples = [number for user in users for number in range(user.num_answers)]
    prompts = [with_text_before(user.prompt, user.model.text) for user in users]
    weights = [_weights(model, user.model, names) for user in users]
    texts = model.generate(
        [prompts[index] for index in owners],
        [weights[index] for index in owners],
        soft_tokens=[users[index].model.soft_tokens for index in owners],
        places=[users[index].place + number * _BETWEEN_SAMPLES for index, number in zip(owners, samples, strict=True)],
        **sampling,
    )
    answers: list[list[str]] = [[] for _ in users]
    for index, text in zip(owners, texts, strict=True):
        answers[index].append(text)
    return [user.best(own) for user, own in zip(users, answers, strict=True)]


def _weights(model: SoupModel, personal: PersonalModel, names: dict[Path, str]) -> ExpertWeights:
    """Return the weights of the profile, with weight 1 for the private adapter.

    Raises:
        UsageError: if the profile has a weight for the private adapter too.
    """
    weights = model.resolve(personal.profile)
    if personal.adapter_folder is None:
        return weights
    name = names[personal.adapter_folder]
    if name in weights.weights:
        raise UsageError(
            f"the profile has a weight for {name!r}, which is the private adapter too",
            where=str(personal.adapter),
            mend="leave it out of the profile, or leave out the adapter",
        )
    return ExpertWeights({**weights.weights, name: 1.0}, weights.version)
