"""What a server can't be faster than: the prompts of all users read at once and one step, and generate in process."""

from __future__ import annotations

import json
import statistics
import sys
import time

from benchmarks.crowd import users
from benchmarks.ways.presence import found

_ROUNDS = 5
_ALONE = 24


def main(experts: str) -> None:
    """Print the seconds of one prefill with one step, and of a token of SoupModel.generate, one request at a time."""
    import torch

    soup = found("personalized_soups.mixing.model", "SoupModel")
    batch_of = found("personalized_soups.serving.engine.batch", "Batch")
    row_of = found("personalized_soups.serving.engine.batch", "BatchRow")
    chooser, wishes = (
        found("personalized_soups.serving.engine.token_sampler", name) for name in ("TokenSampler", "SamplingParams")
    )
    model = soup.from_pretrained(found("personalized_soups.tiny", "BASE_FOLDER"), experts, device="cpu", same_base=True)
    asking = users()
    first = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            batch = batch_of(model)
            rows = [
                row_of(model.generator.encoded(user.prompt), model.resolve(dict(user.weights)), chooser(wishes()))
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
        num_tokens += len(model.tokenizer(text)["input_ids"]) + 1
    print(json.dumps({"seconds": seconds, "first": statistics.median(first), "per_token": seconds / num_tokens}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
