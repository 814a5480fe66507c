"""Pieces that come while somebody waits: all of them, in order, until the end; what nobody waits for is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.serving.engine.request import Finish, GenerationRequest, Piece
from personalized_soups.serving.protocol.piece_queue import (
    ClientDisconnectedError,
    PieceDispatcher,
    PieceQueue,
    pieces_of,
)


class _Batcher:
    """Remembers what was given up."""

    def __init__(self) -> None:
        self.aborted: list[GenerationRequest] = []

    def abort(self, asks: Sequence[GenerationRequest]) -> None:
        self.aborted += asks


class _World:
    """Two answers with one queue, a client that hangs up when it is told to, and what came."""

    def __init__(self) -> None:
        self.queue = PieceQueue()
        self.asks = [GenerationRequest([1], ExpertWeights(), 4, destination=(self.queue, index)) for index in range(2)]
        self.batcher: Any = _Batcher()
        self.gone = asyncio.Event()
        self.came: list[tuple[int, Piece]] = []
        self.dispatcher = PieceDispatcher(asyncio.get_running_loop())
        self.is_watched = self.stays_watched = False

    async def receive(self) -> dict[str, Any]:
        self.is_watched = True
        try:
            await self.gone.wait()
        finally:
            self.is_watched = False
        return {"type": "http.disconnect"}

    async def take(self, seconds: float = 20.0, after: Callable[[], None] = lambda: None) -> None:
        source = pieces_of(self.batcher, self.asks, receive=self.receive, seconds=seconds)
        async with aclosing(source):
            async for pieces in source:
                self.came += pieces
                after()

    def deliver(self, *pieces: tuple[int, Piece]) -> None:
        self.dispatcher.deliver([(self.asks[index], piece) for index, piece in pieces])


def _run(test: Callable[[_World], Awaitable[None]]) -> _World:
    async def run() -> _World:
        world = _World()
        async with asyncio.timeout(10):
            await test(world)
        await asyncio.sleep(0)
        world.stays_watched = world.is_watched  # the loop's end ends every watch
        return world

    return asyncio.run(run())


A, B, END, FAULT = Piece(1, "a"), Piece(2, "b"), Piece(3, "c", finish=Finish.STOP), Piece(error=ValueError("x"))


def test_all_pieces_come_in_order_until_every_answer_is_at_its_end() -> None:
    async def test(world: _World) -> None:
        rest = [((0, END),), ((1, A), (1, FAULT))]

        def more() -> None:
            if rest:
                world.deliver(*rest.pop(0))

        world.deliver((0, A), (1, B))
        await world.take(after=more)

    world = _run(test)
    assert world.came == [(0, A), (1, B), (0, END), (1, A), (1, FAULT)]
    assert world.batcher.aborted == []
    assert not world.stays_watched  # nothing waits for the client to hang up any more


def test_a_client_that_hangs_up_gives_up_what_is_not_done() -> None:
    async def test(world: _World) -> None:
        world.deliver((0, END), (1, A))
        with pytest.raises(ClientDisconnectedError):
            await world.take(after=world.gone.set)

    world = _run(test)
    assert world.batcher.aborted == world.asks[1:]


def test_time_that_is_over_gives_up_everything() -> None:
    async def test(world: _World) -> None:
        with pytest.raises(TimeoutError):
            await world.take(seconds=0.01)

    world = _run(test)
    assert world.batcher.aborted == world.asks
    assert not world.stays_watched


def test_a_reader_that_stops_gives_up() -> None:
    async def test(world: _World) -> None:
        world.deliver((0, A), (1, END))
        source = pieces_of(world.batcher, world.asks, receive=world.receive, seconds=20)
        async with aclosing(source):
            await anext(source)

    assert len(_run(test).batcher.aborted) == 1


def test_a_queue_waits_for_news_again() -> None:
    async def test(world: _World) -> None:
        world.queue.put(0, A)
        assert await world.queue.get() == [(0, A)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.queue.get(), 0.01)

    _run(test)


def test_nobody_is_there_any_more_once_the_loop_is_closed() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    PieceDispatcher(loop).deliver([])
