"""A request's answers while they are made: the batcher's thread brings pieces, the event loop waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from starlette.types import Receive

from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.engine.request import GenerationRequest, Piece


class HungUpError(Exception):
    """The client has gone."""


class PieceQueue:
    """Collects the pieces of one request's answers; lives in one event loop."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, Piece]] = []
        self._is_hung_up = False
        self._news = asyncio.Event()

    def put(self, index: int, piece: Piece) -> None:
        """Take a piece of answer number `index`."""
        self._pieces.append((index, piece))
        self._news.set()

    def hang_up(self) -> None:
        """Say that nobody waits any more."""
        self._is_hung_up = True
        self._news.set()

    async def next(self) -> Sequence[tuple[int, Piece]]:
        """Return all pieces that came since the last call, at least one.

        Raises:
            HungUpError: if nobody waits any more.
        """
        await self._news.wait()
        self._news.clear()
        if self._is_hung_up:
            raise HungUpError
        pieces, self._pieces = self._pieces, []
        return pieces


class PieceDispatcher:
    """Hands the batcher's pieces to those who wait for them.

    Args:
        loop: in which they wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def deliver(self, pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
        """Let the loop hand out pieces; called by the batcher's thread, once for each step."""
        try:
            self._loop.call_soon_threadsafe(_hand_out, pieces)
        except RuntimeError:  # the loop has ended, and everybody with it
            return


def _hand_out(pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
    for ask, piece in pieces:
        waiter, index = ask.destination
        waiter.put(index, piece)


async def pieces_of(
    batcher: Batcher, asks: Sequence[GenerationRequest], *, receive: Receive, seconds: float
) -> AsyncGenerator[Sequence[tuple[int, Piece]]]:
    """Yield what comes of some answers until all are at their end, and give them up when nobody waits for them.

    Args:
        batcher: that makes them.
        asks: submitted already, with one waiter.
        receive: of ASGI, after the body; tells when the client hangs up.
        seconds: that all may take.

    Raises:
        TimeoutError: if they take longer.
        HungUpError: if the client has gone.
    """
    waiter: PieceQueue = asks[0].destination[0]
    watch = asyncio.create_task(_watch(receive, waiter))
    open_answers = set(range(len(asks)))
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        while open_answers:
            # not around the yield: whoever is given the pieces is not to be broken off
            async with asyncio.timeout_at(deadline):
                pieces = await waiter.next()
            open_answers.difference_update(index for index, piece in pieces if piece.is_last)
            yield pieces
    finally:
        watch.cancel()
        if open_answers:
            batcher.abort([asks[index] for index in open_answers])


async def _watch(receive: Receive, waiter: PieceQueue) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    waiter.hang_up()
