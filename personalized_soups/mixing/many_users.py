"""Answer many users' prompts in mixed batches, in which each row may be of another user."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError, choose_from
from personalized_soups.generation.prompts import PromptRequest
from personalized_soups.mixing.model import SoupModel
from personalized_soups.mixing.personal_answers import answer
from personalized_soups.mixing.personal_model import PersonalModel


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of one user.

    Attributes:
        prompt: the text of the prompt.
        user: the user who asks, or None if neither the prompt nor a profile names the user.
        profile: the profile of the user, or None without profiles.
    """

    prompt: str
    user: str | None
    profile: Profile | None


class Requests:
    """The requests for a list of prompts, in the order of the prompts.

    A prompt that names its user makes one request, with the profile of that user. Any other prompt makes one request
    with each profile. Without profiles, each prompt makes one request. Requests are created only when they are needed.

    Args:
        prompts: the prompts. A prompt may name its user.
        profiles: one profile for each user, or None if users have no profiles.

    Raises:
        UsageError: if a prompt names a user who has no profile, or if two profiles have the same user.
    """

    def __init__(self, prompts: Sequence[PromptRequest], profiles: Sequence[Profile] | None) -> None:
        self._prompts = prompts
        self._profiles = profiles
        if profiles is None:
            self._starts = list(range(len(prompts) + 1))
            return
        place: dict[str, int] = {}
        for index, profile in enumerate(profiles):
            if place.setdefault(profile.user, index) != index:
                raise UsageError(
                    f"two profiles have the user {profile.user!r}",
                    where=profile.place("user"),
                    mend="give each profile a different `user`",
                )
        for request in prompts:
            if request.user is not None and request.user not in place:
                raise UsageError(
                    f"no profile has the user {request.user!r}",
                    where=request.where,
                    mend=choose_from(request.user, place),
                )
        # Only positions are stored, because a million users with a thousand prompts make a billion requests.
        self._own = [None if request.user is None else place[request.user] for request in prompts]
        # The number of each prompt's first request. The last entry is the number of all requests.
        self._starts = [0]
        for own in self._own:
            self._starts.append(self._starts[-1] + (len(profiles) if own is None else 1))

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, index: int) -> Request:
        """Return the request with the number `index`, counted from 0."""
        # `_starts` is sorted, so the prompt is the last one whose first request is at or before `index`.
        prompt = bisect_right(self._starts, index) - 1
        asked = self._prompts[prompt]
        if self._profiles is None:
            return Request(asked.prompt, asked.user, None)
        own = self._own[prompt]
        profile = self._profiles[index - self._starts[prompt] if own is None else own]
        return Request(asked.prompt, profile.user, profile)

    def batches(self, size: int, first: int = 0) -> Iterator[list[Request]]:
        """Yield lists of `size` requests, starting with the request number `first`. The last list may be shorter."""
        for start in range(first, len(self), size):
            yield [self.at(index) for index in range(start, min(start + size, len(self)))]


def answer_many(
    model: SoupModel,
    requests: Requests,
    *,
    personal: Callable[[Request], PersonalModel] = lambda request: PersonalModel(profile=request.profile),
    first: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[list[tuple[Request, str]]]:
    """Yield the requests with their answers, one batch at a time, starting with the request number `first`.

    An answer depends only on its request, the seed and the number of the request (up to rounding, which depends on the
    batch). So an interrupted run that is resumed gives the same answers as an uninterrupted run.

    Args:
        model: the base with its experts.
        requests: the requests.
        personal: a function that returns the personal model with which a request is answered.
        first, max_new_tokens, temperature, seed, batch_size: as for `answer`.

    Raises:
        SoupError: in the same cases as `answer`.
    """
    done = first
    for batch in requests.batches(batch_size, first):
        answers = answer(
            model,
            [request.prompt for request in batch],
            [personal(request) for request in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            # Places among all requests give a resumed run the same random numbers.
            places=range(done, done + len(batch)),
        )
        done += len(batch)
        yield list(zip(batch, answers, strict=True))
