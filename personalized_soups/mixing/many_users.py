"""Answer many users' prompts in mixed batches, in which each row may be of another user."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError, choose_from
from personalized_soups.generation.prompts import PromptRequest
from personalized_soups.mixing.model import SoupModel


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with one profile.

    Attributes:
        prompt: the text of the prompt.
        profile: the profile of the user who asks.
    """

    prompt: str
    profile: Profile


class Requests:
    """The requests for a list of prompts, in the order of the prompts.

    A prompt that names its user makes one request, with the profile of that user. Any other prompt makes one request
    with each profile. Requests are created only when they are needed.

    Args:
        prompts: the prompts. A prompt may name its user.
        profiles: one profile for each user.

    Raises:
        UsageError: if a prompt names a user who has no profile, or if two profiles have the same user.
    """

    def __init__(self, prompts: Sequence[PromptRequest], profiles: Sequence[Profile]) -> None:
        self._prompts = prompts
        self._profiles = profiles
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
        own = self._own[prompt]
        profile = self._profiles[index - self._starts[prompt] if own is None else own]
        return Request(self._prompts[prompt].prompt, profile)

    def batches(self, size: int, first: int = 0) -> Iterator[list[Request]]:
        """Yield lists of `size` requests, starting with the request number `first`. The last list may be shorter."""
        for start in range(first, len(self), size):
            yield [self.at(index) for index in range(start, min(start + size, len(self)))]


def answer_many(
    model: SoupModel,
    requests: Requests,
    *,
    first: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[list[tuple[Request, str]]]:
    """Yield the requests with their answers, one batch at a time, starting with the request number `first`.

    An answer depends only on its request, the seed and the number of the request (up to rounding, which depends on the
    batch). So an interrupted run that is resumed gives the same answers as an uninterrupted run.

    Raises:
        SoupError: in the same cases as `SoupModel.generate`.
    """
    done = first
    for batch in requests.batches(batch_size, first):
        answers: list[str] = model.generate(
            [request.prompt for request in batch],
            [request.profile for request in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            # Places among all requests give a resumed run the same random numbers.
            places=range(done, done + len(batch)),
        )
        done += len(batch)
        yield list(zip(batch, answers, strict=True))
