"""`Retention`: deletes users' old answers to questions while the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from personalized_soups.errors import SoupError
from personalized_soups.users.profiles.answers import AnswerStore

_log = logging.getLogger(__name__)

# The shortest and the longest time between two deletions, in seconds.
_SHORTEST, _LONGEST = 60.0, 3600.0

# Between the limits above, answers are deleted this many times in the time for which they are kept.
_TIMES = 24


class Retention:
    """Deletes answers that are older than a given time, at the start and then periodically.

    Args:
        answers: the store of the answers.
        keep: the time for which answers are kept.
        sleep: waits for a number of seconds.
    """

    def __init__(
        self, answers: AnswerStore, keep: timedelta, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._answers = answers
        self._keep = keep
        self._sleep = sleep
        self.seconds = min(max(keep.total_seconds() / _TIMES, _SHORTEST), _LONGEST)

    async def run(self) -> None:
        """Delete old answers until the task is cancelled. Errors are logged, and the next deletion tries again."""
        while True:
            try:
                num_answers = await asyncio.to_thread(self._answers.expire, datetime.now(UTC) - self._keep)
            except SoupError as error:
                _log.error("old answers cannot be deleted now: %s (%s)", error.what, error.where)
            except Exception:
                _log.exception("old answers cannot be deleted")
            else:
                if num_answers:
                    _log.info("%d answers were older than %s and are deleted", num_answers, self._keep)
            await self._sleep(self.seconds)
