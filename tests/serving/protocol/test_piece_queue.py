"""Pieces arrive in order until every answer has ended; answers that nobody reads are aborted."""

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

DEADLINE = 100.0  # seconds; only ends a hang


class _Batcher:
    """Records aborted requests."""

    def __init__(self) -> None:
        self.aborted: list[GenerationRequest] = []

    def abort(self, requests: Sequence[GenerationRequest]) -> None:
        self.aborted += requests


class _World:
    """Two answers with one queue, a client that disconnects on request, and the pieces that arrived."""

    def __init__(self) -> None:
        self.queue = PieceQueue()
        self.generations = [
            GenerationRequest([1], ExpertWeights(), 4, destination=(self.queue, index)) for index in range(2)
        ]
        self.batcher: Any = _Batcher()
        self.disconnected = asyncio.Event()
        self.arrived: list[tuple[int, Piece]] = []
        self.dispatcher = PieceDispatcher(asyncio.get_running_loop())
        self.is_watched = self.stays_watched = False

    async def receive(self) -> dict[str, Any]:
        self.is_watched = True
        try:
            await self.disconnected.wait()
        finally:
            self.is_watched = False
        return {"type": "http.disconnect"}

    async def take(self, seconds: float = DEADLINE, after: Callable[[], None] = lambda: None) -> None:
        source = pieces_of(self.batcher, self.generations, receive=self.receive, seconds=seconds)
        async with aclosing(source):
            async for pieces in source:
                self.arrived += pieces
                after()

    def deliver(self, *pieces: tuple[int, Piece]) -> None:
        self.dispatcher.deliver([(self.generations[index], piece) for index, piece in pieces])


def _run(test: Callable[[_World], Awaitable[None]]) -> _World:
    async def run() -> _World:
        world = _World()
        async with asyncio.timeout(DEADLINE):
            await test(world)
        await asyncio.sleep(0)
        world.stays_watched = world.is_watched  # before the loop ends and cancels every task
        return world

    return asyncio.run(run())


A, B, END, ERROR = Piece(1, "a"), Piece(2, "b"), Piece(3, "c", finish=Finish.STOP), Piece(error=ValueError("x"))


def test_all_pieces_arrive_in_order_until_every_answer_has_ended() -> None:
    async def test(world: _World) -> None:
        rest = [((0, END),), ((1, A), (1, ERROR))]

        def more() -> None:
            if rest:
                world.deliver(*rest.pop(0))

        world.deliver((0, A), (1, B))
        await world.take(after=more)

    world = _run(test)
    assert world.arrived == [(0, A), (1, B), (0, END), (1, A), (1, ERROR)]
    assert world.batcher.aborted == []
    assert not world.stays_watched


def test_a_client_that_disconnects_aborts_unfinished_answers() -> None:
    async def test(world: _World) -> None:
        world.deliver((0, END), (1, A))
        with pytest.raises(ClientDisconnectedError):
            await world.take(after=world.disconnected.set)

    world = _run(test)
    assert world.batcher.aborted == world.generations[1:]


def test_the_time_limit_aborts_all_answers() -> None:
    async def test(world: _World) -> None:
        with pytest.raises(TimeoutError):
            await world.take(seconds=0.01)

    world = _run(test)
    assert world.batcher.aborted == world.generations
    assert not world.stays_watched


def test_a_reader_that_stops_aborts_unfinished_answers() -> None:
    async def test(world: _World) -> None:
        world.deliver((0, A), (1, END))
        source = pieces_of(world.batcher, world.generations, receive=world.receive, seconds=DEADLINE)
        async with aclosing(source):
            await anext(source)

    assert len(_run(test).batcher.aborted) == 1


def test_a_queue_waits_again_after_each_piece() -> None:
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
