"""Answer three users in one batch: one base in memory, another soup in every row, and nothing merged.

It needs experts, such as those of `psoups quickstart`: python examples/one_batch.py quickstart/experts
"""

from __future__ import annotations

import sys

from personalized_soups import TINY_BASE, Profile, SoupError, SoupModel

USERS = [
    Profile(user="Ada, a chemist in a hurry", weights={"expert": 0.5, "concise": 0.5, "unfriendly": 0.5}),
    Profile(user="Ben, eight years old", weights={"elementary": 0.5, "concise": 0.5, "friendly": 0.5}),
    Profile(user="Cleo, new to all this", weights={"elementary": 0.5, "informative": 0.5, "friendly": 0.5}),
]
PROMPT = "How do I clean an old kettle?"


def main(experts: str) -> None:
    """Print the answers of the base and of every user in one batch, then one answer whose tone changes."""
    model = SoupModel.from_pretrained(TINY_BASE, experts, device="cpu")
    answers = model.generate([PROMPT] * 4, [None, *USERS])
    print(f"{PROMPT}\n")
    for name, answer in zip(["the base", *(profile.user for profile in USERS)], answers, strict=True):
        print(f"{name}: {answer}\n")
    # a weight may depend on the token: friendly at first, unfriendly at the end
    cooling = {"elementary": 0.5, "informative": 0.3, "friendly": lambda token: 0.6 if token < 30 else -0.9}
    print(f"cooling down: {model.generate(PROMPT, [cooling])[0]}")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "quickstart/experts")
    except SoupError as error:
        sys.exit(f"error: {error}\n(`make quickstart` trains experts, in quickstart/experts)")
