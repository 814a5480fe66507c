"""Passes the pieces of answers from the batcher's thread to the event loop, which sends them to the clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from starlette.types import Receive

from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.engine.request import GenerationRequest, Piece


class ClientDisconnectedError(Exception):
    """The client closed its connection."""


class PieceQueue:
    """A queue of pieces of one request's answers. All methods must be called in one event loop."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, Piece]] = []
        self._is_disconnected = False
        self._changed = asyncio.Event()

    def put(self, index: int, piece: Piece) -> None:
        """Append a piece of the answer with this index."""
        self._pieces.append((index, piece))
        self._changed.set()

    def disconnect(self) -> None:
        """Record that the client has closed the connection."""
        self._is_disconnected = True
        self._changed.set()

    async def get(self) -> Sequence[tuple[int, Piece]]:
        """Wait for a piece, and return all pieces that have arrived since the last call.

        Raises:
            ClientDisconnectedError: if the client has closed its connection.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._is_disconnected:
            raise ClientDisconnectedError
        pieces, self._pieces = self._pieces, []
        return pieces


class PieceDispatcher:
    """Delivers the batcher's pieces to the queues of their requests.

    Args:
        loop: the event loop of the queues.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def deliver(self, pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
        """Put the pieces of a step into the queues of their requests.

        The batcher's thread calls this method. The pieces are put into the queues later, in the event loop.
        """
        try:
            self._loop.call_soon_threadsafe(_put_all, pieces)
        except RuntimeError:  # the loop is closed, and so is every connection
            return


def _put_all(pieces: Sequence[tuple[GenerationRequest, Piece]]) -> None:
    for generation, piece in pieces:
        queue, index = generation.destination
        queue.put(index, piece)


async def pieces_of(
    batcher: Batcher, generations: Sequence[GenerationRequest], *, receive: Receive, seconds: float
) -> AsyncGenerator[Sequence[tuple[int, Piece]]]:
    """Yield the pieces of answers until all answers have ended.

    If the caller stops earlier, the unfinished answers are aborted.

    Args:
        batcher: generates the answers.
        generations: the batcher's requests. All have the same queue as destination.
        receive: the ASGI function that returns the client's next message. The request's body must have been received,
            so that the next message reports that the client has disconnected.
        seconds: time limit for all answers together.

    Raises:
        TimeoutError: if the answers take longer than `seconds`.
        ClientDisconnectedError: if the client has closed its connection.
    """
    queue: PieceQueue = generations[0].destination[0]
    watch = asyncio.create_task(_watch(receive, queue))
    unfinished = set(range(len(generations)))
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        while unfinished:
            # the timeout must not include the yield, because it would cancel the caller's code
            async with asyncio.timeout_at(deadline):
                pieces = await queue.get()
            unfinished.difference_update(index for index, piece in pieces if piece.is_last)
            yield pieces
    finally:
        watch.cancel()
        if unfinished:
            batcher.abort([generations[index] for index in unfinished])


async def _watch(receive: Receive, queue: PieceQueue) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    queue.disconnect()
