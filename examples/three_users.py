"""Merge a personal adapter for each of three users from six experts, and compare their answers.

It needs experts, such as those of `psoups quickstart`: python examples/three_users.py quickstart/experts
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from personalized_soups import TINY_BASE, ExpertLibrary, Generator, Profile, merge

USERS = [
    Profile(user="Ada, a chemist in a hurry", weights={"expert": 0.5, "concise": 0.5, "unfriendly": 0.5}),
    Profile(user="Ben, eight years old", weights={"elementary": 0.5, "concise": 0.5, "friendly": 0.5}),
    Profile(user="Cleo, new to all this", weights={"elementary": 0.5, "informative": 0.5, "friendly": 0.5}),
]
PROMPT = "How do I clean an old kettle?"


def main(experts: str) -> None:
    """Print the answer of the base and of each user's own model."""
    library = ExpertLibrary.open(experts)
    print(f"{PROMPT}\n\nthe base: {answer(None)}\n")
    for profile in USERS:
        with tempfile.TemporaryDirectory() as scratch:
            adapter = merge(library, profile).write(Path(scratch) / "adapter")
            print(f"{profile.user}: {answer(adapter)}\n")


def answer(adapter: Path | None) -> str:
    """Return the likeliest answer of the base with an adapter."""
    generator = Generator.open(TINY_BASE, adapter)
    ((text,),) = generator.answers([PROMPT], greedy=True)
    return text


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "quickstart/experts")
