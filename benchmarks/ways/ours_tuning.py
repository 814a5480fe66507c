"""Ten candidates on a user's history of 20 items: all in one mixed batch, and one after another.

One after another is what PriME does (arXiv:2503.18008): each candidate is merged, and answers the history in batches of
8. Here the merge costs nothing, because each candidate is a mixture. The same is measured with the whole history in
one batch for each candidate.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.crowd import users
from benchmarks.profiles import random_weights
from personalized_soups.declare.evidence import Example
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.mixing.model import SoupModel
from personalized_soups.tiny import BASE_FOLDER
from personalized_soups.users.tuning.likelihood import TextLikelihood
from personalized_soups.users.tuning.scored_answers import ScoredAnswers

CANDIDATES, ITEMS = 10, 20
_MAX_TOKENS = 100
_TEMPERATURE = 0.1
# PriME's batch of its evaluation.
_FEW = 8
_ROUNDS = 3
_SCALE = 0.3


def main(experts: str) -> None:
    """Print the median seconds of each way. All ways run in turns, so that a load hits them alike."""
    model = SoupModel.from_pretrained(BASE_FOLDER, experts, device="cpu", same_base=True)
    prompts = [user.prompt for user in users(ITEMS)]
    # Weights of this size leave the base's answers sound, so that answers have the lengths of answers.
    candidates = [
        ExpertWeights({name: _SCALE * weight for name, weight in zip(model.experts, weights.values(), strict=True)})
        for weights in random_weights(CANDIDATES).values()
    ]
    history = [
        Example(prompt=prompt, text=text)
        for prompt, text in zip(prompts, model.generate(prompts, max_new_tokens=_MAX_TOKENS), strict=True)
    ]
    lengths: list[int] = []

    def answered(batch_size: int) -> ScoredAnswers:
        def rating(prompt: str, answer: str) -> float:
            lengths.append(len(answer.split()))
            return float(lengths[-1])

        return ScoredAnswers(
            model, prompts, rating, max_new_tokens=_MAX_TOKENS, temperature=_TEMPERATURE, batch_size=batch_size
        )

    ways = {
        "answers": _together(answered(CANDIDATES * ITEMS), candidates),
        "answers_few": _in_turn(answered(_FEW), candidates),
        "answers_whole": _in_turn(answered(ITEMS), candidates),
        "likelihood": _together(TextLikelihood(model, history), candidates),
        "likelihood_few": _in_turn(TextLikelihood(model, history, batch_size=_FEW), candidates),
        "likelihood_whole": _in_turn(TextLikelihood(model, history, batch_size=ITEMS), candidates),
    }
    seconds = _timed(ways)
    print(json.dumps({"seconds": seconds["answers"], **seconds, "words": statistics.mean(lengths)}))


def _together(objective: ScoredAnswers | TextLikelihood, candidates: Sequence[ExpertWeights]) -> Callable[[], None]:
    return lambda: _check(objective.scores(candidates, range(ITEMS), draw=0).size, CANDIDATES * ITEMS)


def _in_turn(objective: ScoredAnswers | TextLikelihood, candidates: Sequence[ExpertWeights]) -> Callable[[], None]:
    def run() -> None:
        for candidate in candidates:
            _check(objective.scores([candidate], range(ITEMS), draw=0).size, ITEMS)

    return run


def _check(found: int, expected: int) -> None:
    if found != expected:
        raise SystemExit(f"{found} scores, but {expected} were asked for")


def _timed(ways: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median seconds of each way; the first round, which is not counted, warms the caches."""
    rounds: list[dict[str, float]] = []
    for _ in range(1 + _ROUNDS):
        spans = {}
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            spans[name] = time.perf_counter() - start
        rounds.append(spans)
    return {name: statistics.median(spans[name] for spans in rounds[1:]) for name in ways}


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
