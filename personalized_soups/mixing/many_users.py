"""Answer many users' prompts in mixed batches, in which each row may have its own user."""

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
        prompt: the text.
        profile: of the user who asks.
    """

    prompt: str
    profile: Profile


class Requests:
    """Each prompt with every profile, or with the profile of the user that it names. Prompt by prompt, made on demand.

    Args:
        prompts: the prompts; a prompt may name its user.
        profiles: one for each user.

    Raises:
        UsageError: if a prompt names a user without a profile, or two profiles have the same user.
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
                    mend="give each profile another user",
                )
        for request in prompts:
            if request.user is not None and request.user not in place:
                raise UsageError(
                    f"no profile has the user {request.user!r}",
                    where=request.where,
                    mend=choose_from(request.user, place),
                )
        # Positions and not requests: a million users with a thousand prompts are a billion requests.
        self._own = [None if request.user is None else place[request.user] for request in prompts]
        # The number of the first request of each prompt, and at the end the number of requests.
        self._starts = [0]
        for own in self._own:
            self._starts.append(self._starts[-1] + (len(profiles) if own is None else 1))

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, index: int) -> Request:
        """Return the request with that number, counted from 0."""
        # `_starts` is sorted: the prompt is the last one that starts at or before the index.
        prompt = bisect_right(self._starts, index) - 1
        own = self._own[prompt]
        profile = self._profiles[index - self._starts[prompt] if own is None else own]
        return Request(self._prompts[prompt].prompt, profile)

    def batches(self, size: int, first: int = 0) -> Iterator[list[Request]]:
        """Yield lists of `size` requests, from the request with the number `first`."""
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
    """Yield the requests with their answers, a batch at a time, from the request with the number `first`.

    An answer depends on its request, the seed and its place among all requests alone (up to the rounding of batched
    arithmetic). So an interrupted run that is resumed gives the answers of an uninterrupted run.

    Raises:
        SoupError: as `SoupModel.generate`.
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
            # The place among all requests, so that a resumed run draws the same numbers.
            places=range(done, done + len(batch)),
        )
        done += len(batch)
        yield list(zip(batch, answers, strict=True))
