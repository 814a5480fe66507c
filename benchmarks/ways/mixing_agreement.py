"""How far each row's logits in a mixed batch are from those of its own merged model in float64, alone.

And whether greedy answers in a padded, mixed batch are those alone: a token may be another one only where the two
likeliest are nearer to each other than the logits of both runs may err.

V vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import decoding
from benchmarks.near_ties import is_near_tie, merged
from personalized_soups.mixing.model import SoupModel

_NEW_TOKENS = 48


def main(experts: str, base: str, rows: int) -> None:
    """Print the largest relative error (norm of the difference over the norm) of so many rows, and what parted.

    `parted` counts the rows whose answer parts from the one alone, `unexplained` those where no near tie explains it.
    """
    ids = decoding.prompts(decoding.load(base, "cpu", "float32").config.vocab_size, "cpu")
    users = decoding.profiles()
    soup = SoupModel(decoding.load(base, "cpu", "float32"), experts)
    with soup.mixture([dict(weights) for weights in users]), torch.no_grad():
        got = soup.model(input_ids=ids).logits.double()
    worst = 0.0
    for row in range(rows):
        true = merged(base, experts, users[row])
        with torch.no_grad():
            want = true(input_ids=ids[row : row + 1]).logits[0]
        worst = max(worst, float((got[row] - want).norm() / want.norm()))
    places = _parting(soup, ids, users)
    unexplained = [row for row, place in places.items() if not is_near_tie(base, experts, users[row], *place)]
    print(json.dumps({"error": worst, "parted": len(places), "unexplained": len(unexplained)}))


def _parting(soup: Any, ids: Tensor, users: Sequence[Mapping[str, float]]) -> dict[int, tuple[Tensor, tuple[int, int]]]:
    """Return, of each row that parts, the tokens before and the two that were chosen: together, and alone."""
    options = {"max_new_tokens": _NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    lengths = [ids.shape[1] - row % 8 for row in range(len(ids))]
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - length for length in lengths]).long()
    together = soup.generate(profiles=list(users), input_ids=ids * mask, attention_mask=mask, **options)
    found = {}
    for row, length in enumerate(lengths):
        alone = soup.generate(profiles=[users[row]], input_ids=ids[row : row + 1, -length:], **options)[0]
        batched = together[row, ids.shape[1] - length :]
        if not torch.equal(alone, batched):
            place = int((alone != batched).nonzero()[0])
            found[row] = alone[:place], (int(batched[place]), int(alone[place]))
    return found


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
