"""64 users at once over HTTP, each with another profile, and the same requests one after another."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from benchmarks.clients import Client, Heard
from benchmarks.crowd import User, server, users
from benchmarks.near_ties import is_near_tie
from personalized_soups.generation.generator import Generator
from personalized_soups.tiny import BASE_FOLDER

_ROUNDS = 3


def main(experts: str) -> None:
    """Print rates, times to the first token, and the answers that part from those alone.

    `parted` counts users whose answer in a crowd is another one than alone, `unexplained` those without a near tie.
    """
    asking = users()
    with server(experts) as (port, _):
        alone, rounds, seconds = asyncio.run(_measured(port, asking))
    num_tokens = sum(heard.num_tokens for heard in alone)
    together = statistics.median(seconds)
    # of the round whose throughput is reported
    heard = rounds[seconds.index(sorted(seconds)[len(seconds) // 2])]
    firsts = sorted(each.first for each in heard)
    parted = {place: each.text for each_round in rounds for place, each in enumerate(each_round)
              if each.text != alone[place].text}  # fmt: skip
    explained = [
        place for place, text in parted.items() if is_explained(experts, asking[place], alone[place].text, text)
    ]
    print(
        json.dumps({
            "seconds": together,
            "tokens_per_second": num_tokens / together,
            "alone_tokens_per_second": num_tokens / sum(each.whole for each in alone),
            "alone_seconds_per_token": sum(each.whole for each in alone) / num_tokens,
            "first_median": statistics.median(firsts),
            "first_95": firsts[int(0.95 * len(firsts))],
            "parted": len(parted),
            "unexplained": len(parted) - len(explained),
        })
    )  # fmt: skip


async def _measured(port: int, asking: Sequence[User]) -> tuple[list[Heard], list[list[Heard]], list[float]]:
    bodies = [user.inline() for user in asking]
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(port)) for _ in asking]
        await asyncio.gather(*(client.ask(body) for client, body in zip(clients, bodies, strict=True)))  # warm
        alone = [await clients[0].ask(body) for body in bodies]
        rounds, seconds = [], []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            rounds.append(
                list(await asyncio.gather(*(client.ask(body) for client, body in zip(clients, bodies, strict=True))))
            )
            seconds.append(time.perf_counter() - began)
    return alone, rounds, seconds


def is_explained(experts: str, user: User, alone: str, together: str) -> bool:
    """Return whether two answers part at a near tie."""
    generator = Generator.open(BASE_FOLDER, device="cpu")
    prompt = generator.encoded(user.prompt)
    mine, other = (
        [*generator.tokenizer(text)["input_ids"], generator.tokenizer.eos_token_id] for text in (alone, together)
    )
    place = next((at for at, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return False
    import torch

    before = torch.tensor([*prompt, *mine[:place]])
    return is_near_tie(str(BASE_FOLDER), experts, user.weights, before, (mine[place], other[place]))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
