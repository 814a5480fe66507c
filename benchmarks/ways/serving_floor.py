"""What a server can't be faster than: the prompts of all users read at once and one step, and generate in process."""

from __future__ import annotations

import json
import statistics
import sys
import time

from benchmarks.crowd import users
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.engine.batch import Batch, BatchRow
from personalized_soups.serving.engine.token_sampler import SamplingParams, TokenSampler
from personalized_soups.tiny import BASE_FOLDER

_ROUNDS = 5
_ALONE = 24


def main(experts: str) -> None:
    """Print the seconds of one prefill with one step, and of a token of SoupModel.generate, one request at a time."""
    import torch

    model = SoupModel.from_pretrained(BASE_FOLDER, experts, device="cpu", same_base=True)
    asking = users()
    first = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            batch = Batch(model)
            rows = [
                BatchRow(
                    model.generator.encoded(user.prompt),
                    model.resolve(dict(user.weights)),
                    TokenSampler(SamplingParams()),
                )
                for user in asking
            ]
            began = time.perf_counter()
            batch.read(rows, 1 << 20)
            batch.step()
            first.append(time.perf_counter() - began)
            batch.clear()
    alone = asking[:_ALONE]
    options = {"max_new_tokens": alone[0].body()["max_tokens"]}
    model.generate([alone[0].prompt], [dict(alone[0].weights)], **options)
    seconds, num_tokens = 0.0, 0
    for user in alone:
        began = time.perf_counter()
        (text,) = model.generate([user.prompt], [dict(user.weights)], **options)
        seconds += time.perf_counter() - began
        num_tokens += len(model.generator.tokenizer.encode(text)) + 1
    print(json.dumps({"seconds": seconds, "first": statistics.median(first), "per_token": seconds / num_tokens}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
