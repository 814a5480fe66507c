"""Many users' prompts answered in mixed batches: a batch has as many users as rows."""

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
    """One prompt with one profile."""

    prompt: str
    profile: Profile


class Requests:
    """Every prompt with every profile, or with that of the user whom it names; prompt by prompt, made on demand.

    Args:
        prompts: what is asked, with the user who asks where one is named.
        profiles: each of another user.

    Raises:
        UsageError: if a prompt names a user without a profile, or two profiles one user.
    """

    def __init__(self, prompts: Sequence[PromptRequest], profiles: Sequence[Profile]) -> None:
        self._prompts = prompts
        self._profiles = profiles
        place: dict[str, int] = {}
        for index, profile in enumerate(profiles):
            if place.setdefault(profile.user, index) != index:
                raise UsageError(
                    f"two profiles are {profile.user!r}'s",
                    where=profile.place("user"),
                    mend="give each profile a user of its own",
                )
        for asked in prompts:
            if asked.user is not None and asked.user not in place:
                raise UsageError(
                    f"no profile is {asked.user!r}'s", where=asked.where, mend=choose_from(asked.user, place)
                )
        self._own = [None if asked.user is None else place[asked.user] for asked in prompts]
        self._starts = [0]
        for own in self._own:
            self._starts.append(self._starts[-1] + (len(profiles) if own is None else 1))

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, index: int) -> Request:
        """Return one request, counted from 0."""
        prompt = bisect_right(self._starts, index) - 1
        own = self._own[prompt]
        profile = self._profiles[index - self._starts[prompt] if own is None else own]
        return Request(self._prompts[prompt].prompt, profile)

    def batches(self, size: int, first: int = 0) -> Iterator[list[Request]]:
        """Yield the requests from `first` on, `size` at a time."""
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
    """Yield the requests from `first` on with their answers, a batch at a time.

    An answer depends on its request, the seed and its place among all requests alone (up to the rounding of batched
    arithmetic), so that what goes on where it was interrupted gives the answers of what never was.

    Raises:
        SoupError: as SoupModel.generate.
    """
    done = first
    for batch in requests.batches(batch_size, first):
        answers: list[str] = model.generate(
            [each.prompt for each in batch],
            [each.profile for each in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            places=range(done, done + len(batch)),
        )
        done += len(batch)
        yield list(zip(batch, answers, strict=True))
