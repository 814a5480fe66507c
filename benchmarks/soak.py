"""Ten minutes at full load: clients hang up at random, profiles change meanwhile, and every answer is checked.

python -m benchmarks.soak [--seconds 600] [--users 64]; the last line is one JSON object; 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.clients import Client, HungUp
from benchmarks.crowd import USERS, User, resident_bytes, server, users
from benchmarks.shapes import SHAPES
from benchmarks.ways.serving_load import is_explained
from benchmarks.world import Part, World

# Soups that profiles change between, and prompts: every pair has a solo answer to be compared with.
_SOUPS = 8
_PROMPTS = 8

# An answer that takes longer is stuck: a whole crowd's takes about a second.
_STUCK_SECONDS = 60.0

# Of the run, in which memory may still grow: pools fill, caches reach their size.
_WARM = 0.2


@dataclass
class Seen:
    """What happened."""

    answers: int = 0
    hung_up: int = 0
    updates: int = 0
    conflicts: int = 0
    tokens: int = 0
    parted: list[tuple[int, int, str]] = field(default_factory=list)  # soup, prompt, text
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


class Soak:
    """One run.

    Args:
        port: of the server.
        pid: of its process.
        crowd: users who ask at once.
        seconds: that it takes.
    """

    def __init__(self, port: int, pid: int, *, crowd: int, seconds: float) -> None:
        self.seen = Seen()
        self._port = port
        self._pid = pid
        self._crowd = crowd
        self._seconds = seconds
        asking = users(max(_SOUPS, _PROMPTS))
        self.soups = [user.weights for user in asking[:_SOUPS]]
        self.prompts = [user.prompt for user in asking[:_PROMPTS]]
        self._solo: dict[tuple[int, int], str] = {}
        # of each user, the soup of each version that was written
        self._written: dict[str, dict[int, int]] = defaultdict(dict)

    async def run(self) -> None:
        """Soak."""
        async with Client(self._port) as client:
            for soup, weights in enumerate(self.soups):
                for place, prompt in enumerate(self.prompts):
                    heard = await client.ask(User(prompt, weights).inline())
                    self._solo[soup, place] = heard.text
            for number in range(self._crowd):
                await self._write(client, f"u{number}", random.Random(number))
        self._end = time.monotonic() + self._seconds
        # two writers for each user, so that they meet
        tasks = [self._asker(number) for number in range(self._crowd)]
        tasks += [self._writer(number) for number in range(8)]
        await asyncio.gather(*tasks, self._watch())
        await self._check_histories()

    @property
    def solo(self) -> Mapping[tuple[int, int], str]:
        """The answer of each soup to each prompt, asked alone."""
        return self._solo

    async def _asker(self, number: int) -> None:
        draw = random.Random(1000 + number)
        async with Client(self._port) as client:
            while time.monotonic() < self._end:
                place = draw.randrange(_PROMPTS)
                user = f"u{draw.randrange(self._crowd)}"
                leave = draw.randrange(1, 12) if draw.random() < 0.15 else None
                body = User(self.prompts[place], {}).body(f"soup:{user}")
                try:
                    async with asyncio.timeout(_STUCK_SECONDS):
                        heard = await client.ask(body, hang_up_after=leave)
                except HungUp:
                    self.seen.hung_up += 1
                    continue
                except Exception as fault:
                    self.seen.wrong.append(f"{type(fault).__name__}: {fault}")
                    return
                self.seen.answers += 1
                self.seen.tokens += heard.num_tokens
                self.seen.first.append(heard.first)
                self._compare(user, int(heard.model.rpartition("@")[2]), place, heard.text)

    def _compare(self, user: str, version: int, place: int, text: str) -> None:
        soup = self._written[user].get(version)
        if soup is None:  # its writer has not heard yet that it was written
            asyncio.get_running_loop().call_later(1.0, self._compare, user, version, place, text)
        elif text != self._solo[soup, place]:
            self.seen.parted.append((soup, place, text))

    async def _writer(self, number: int) -> None:
        draw = random.Random(2000 + number)
        async with Client(self._port) as client:
            while time.monotonic() < self._end:
                await self._write(client, f"u{draw.randrange(self._crowd)}", draw)
                await asyncio.sleep(draw.random() * 0.05)

    async def _write(self, client: Client, user: str, draw: random.Random) -> None:
        """Give a user another soup, unless somebody else does so first."""
        current = max(self._written[user], default=0)
        soup = draw.choice([each for each in range(_SOUPS) if each != self._written[user].get(current)])
        condition = {"If_Match": f'"{current}"'} if current else {"If_None_Match": "*"}
        status, body = await client.call(
            "PUT", f"/v1/profiles/{user}", {"weights": dict(self.soups[soup])}, **condition
        )
        if status in {200, 201}:
            self.seen.updates += 1
            self._written[user][body["version"]] = soup
        elif status == 412:
            self.seen.conflicts += 1
        else:
            self.seen.wrong.append(f"PUT {status}: {body}")

    async def _watch(self) -> None:
        began = time.monotonic()
        while time.monotonic() < self._end:
            self.seen.memory.append((time.monotonic() - began, resident_bytes(self._pid)))
            await asyncio.sleep(1.0)

    async def _check_histories(self) -> None:
        """See that the store has just what was written, and the server nothing left to do."""
        await asyncio.sleep(2.0)
        async with Client(self._port) as client:
            for user, versions in self._written.items():
                status, body = await client.call("GET", f"/v1/profiles/{user}?history=true")
                kept = {each["version"]: each["profile"]["weights"] for each in body["data"]} if status == 200 else {}
                want = {version: dict(self.soups[soup]) for version, soup in versions.items()}
                if kept != want:
                    self.seen.wrong.append(f"{user}: {len(kept)} versions are kept, {len(want)} were written")


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, and print what was seen."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--users", type=int, default=USERS)
    options = parser.parse_args(argv)
    world = World.default()
    embedded = Part(SHAPES["embedded"], "free")
    for part in world.missing([embedded]):
        world.build(part)
    experts = str(world.experts(embedded.shape))
    with tempfile.TemporaryDirectory() as folder:
        store = ("--profiles", str(Path(folder) / "profiles.db"))
        with server(experts, *store) as (port, pid):
            soak = Soak(port, pid, crowd=options.users, seconds=options.seconds)
            asyncio.run(soak.run())
            left = _left(port)
    result = report(soak, experts, left)
    print(json.dumps(result), flush=True)
    return int(bool(result["wrong"] or result["unexplained"] or result["left"]))


def report(soak: Soak, experts: str, left: Mapping[str, float]) -> dict[str, Any]:
    """Return what was seen, as figures."""
    seen = soak.seen
    unexplained = [
        (soup, place, text)
        for soup, place, text in seen.parted
        if not is_explained(experts, User(soak.prompts[place], soak.soups[soup]), soak.solo[soup, place], text)
    ]
    span = seen.memory[-1][0]
    settled = [num_bytes for at, num_bytes in seen.memory if at >= _WARM * span]
    third = max(1, len(settled) // 3)
    return {
        "seconds": round(span),
        "answers": seen.answers,
        "tokens_per_second": seen.tokens / span,
        "hung_up": seen.hung_up,
        "updates": seen.updates,
        "conflicts": seen.conflicts,
        "parted": len(seen.parted),
        "unexplained": len(unexplained),
        "wrong": seen.wrong[:10],
        "left": sum(left.values()),
        "first_median": statistics.median(seen.first),
        "first_95": sorted(seen.first)[int(0.95 * len(seen.first))],
        "memory_mb": [round(num_bytes / 1e6, 1) for num_bytes in (settled[0], max(settled), settled[-1])],
        "memory_growth": statistics.median(settled[-third:]) / statistics.median(settled[:third]) - 1,
    }


def _left(port: int) -> dict[str, float]:
    """Return what the server says that it still has to do."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    names = ("psoups_waiting_answers", "psoups_running_answers")
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(names)}


if __name__ == "__main__":
    sys.exit(main())
