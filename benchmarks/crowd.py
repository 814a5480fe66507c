"""The users who ask at once: each with a prompt and a profile of their own, and the server that they ask."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.profiles import random_weights

USERS = 64
_THINGS = ("kettle", "blue wagon", "pan", "old shoe", "big red bike", "window", "desk lamp", "green boat")
_WAYS = ("How do I clean {}?", "Can you help me clean {}?", "Tell me how to clean {}, please.")
_MAX_TOKENS = 160


@dataclass(frozen=True, slots=True)
class User:
    """A prompt, and whose soup it is answered with."""

    prompt: str
    weights: Mapping[str, float]

    def body(self, model: str = "tiny", **more: Any) -> dict[str, Any]:
        """Return the request for their greedy answer."""
        messages = [{"role": "user", "content": self.prompt}]
        return {"model": model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS, **more}

    def inline(self) -> dict[str, Any]:
        """Return the request with the profile in it."""
        return self.body(profile={"weights": dict(self.weights)})


def users(count: int = USERS) -> Sequence[User]:
    """Return so many users, the same each time; no two have one profile."""
    draw = random.Random(1)
    prompts = [draw.choice(_WAYS).format(f"a {draw.choice(_THINGS)}") for _ in range(count)]
    return [User(prompt, weights) for prompt, weights in zip(prompts, random_weights(count).values(), strict=True)]


@contextmanager
def server(experts: str, *more: str) -> Iterator[tuple[int, int]]:
    """Run `psoups serve` on the embedded base, and yield its port and its process id.

    Raises:
        RuntimeError: if it does not come up.
    """
    command = [sys.executable, "-m", "personalized_soups", "serve", "--base", "tiny", "--experts", experts]
    process = subprocess.Popen([*command, "--port", "0", "--same-base", *more], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    output = ""
    try:
        while "OpenAI's API" not in output:
            line = process.stderr.readline()
            if not line:
                raise RuntimeError(f"the server has not come up: {output}")
            output += line
        port = int(output.split("OpenAI's API http://127.0.0.1:")[1].split("/")[0])
        wait_ready(port)
        yield port, process.pid
    finally:
        process.terminate()
        process.communicate(timeout=60)


def wait_ready(port: int, seconds: float = 60.0) -> None:
    """Wait until the server is ready."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10):
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def resident_bytes(pid: int) -> int:
    """Return a process' resident memory."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096
