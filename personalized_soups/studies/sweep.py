"""Measure how answers change while the weight moves from one side's expert to another side's expert.

All steps of a prompt are rows of one batch, and nothing is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.expert_weights import ProfileLike
from personalized_soups.declare.profile import Profile
from personalized_soups.evaluation.monotone import judge_sweep
from personalized_soups.evaluation.pictures.curves import Curve, draw_curve
from personalized_soups.evaluation.scores import grade
from personalized_soups.evaluation.win_rates import bootstrap_interval
from personalized_soups.files.lines import GrowingLines, read_lines
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.scorers import Scorer

ANSWERS, RESULTS, PICTURE = "answers.jsonl", "sweep.json", "sweep.png"


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep from the expert `low` alone to the expert `high` alone.

    Attributes:
        low: the expert at share 0.
        high: the expert at share 1.
        num_steps: the number of steps, including both ends.
        scale: the sum of the two weights.
    """

    low: str
    high: str
    num_steps: int = 11
    scale: float = 1.0

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the `high` expert in the sum of the weights, for each step."""
        return tuple(step / (self.num_steps - 1) for step in range(self.num_steps))

    def profile(self, share: float) -> Profile:
        """Return the profile in which the `high` expert has the given share of the weight."""
        weights = {self.low: self.scale * (1 - share), self.high: self.scale * share}
        return Profile(user=f"w = {share:g}", weights=weights, allow_opposed=True)


def answer_sweep(
    model: SoupModel,
    sweep: Sweep,
    prompts: Sequence[str],
    kept: GrowingLines,
    *,
    batch_size: int = 64,
    on_done: Callable[[int], None] = lambda _: None,
    **sampling: Any,
) -> None:
    """Answer every prompt with the base alone and at every step, and append a line for each prompt to `kept`.

    All answers to one prompt are sampled with the same random numbers.

    Args:
        model: a model with both experts.
        sweep: the sweep.
        prompts: the prompts. Prompts whose answers `kept` already holds are skipped.
        kept: the file of the answers.
        batch_size: the maximum number of rows in a batch. A batch always holds all rows of at least one prompt.
        on_done: called after each batch with the number of answered prompts.
        sampling: max_new_tokens, temperature and seed, as for SoupModel.generate.
    """
    rows: list[ProfileLike] = [None, *(sweep.profile(share) for share in sweep.shares)]
    at_once = max(1, batch_size // len(rows))
    for first in range(kept.num_done, len(prompts), at_once):
        batch = prompts[first : first + at_once]
        answers: list[str] = model.generate(
            [prompt for prompt in batch for _ in rows],
            rows * len(batch),
            places=[first + index for index in range(len(batch)) for _ in rows],
            batch_size=at_once * len(rows),
            **sampling,
        )
        by_prompt = [answers[start : start + len(rows)] for start in range(0, len(answers), len(rows))]
        kept.add(
            [
                {"prompt": prompt, "base": base, "steps": steps}
                for prompt, (base, *steps) in zip(batch, by_prompt, strict=True)
            ]
        )
        on_done(first + len(batch))


def score_sweep(
    answers: Path,
    sweep: Sweep,
    catalogue: Catalogue | None,
    side: str,
    *,
    scorers: Mapping[str, Scorer] | None = None,
) -> dict[str, Any]:
    """Return the mean score of the answers at each step, with 95% intervals from a bootstrap over prompts.

    An invalid answer, which is ill-formed or off topic, scores 0. `valid` is the share of valid answers at each step.

    Args:
        answers: the file that `answer_sweep` has written.
        sweep: the sweep.
        catalogue: declares the scorer of `side`. With None, the score is the number of words.
        side: the side towards which answers are scored: the side of the `high` expert.
        scorers: functions that replace the catalogue's scorers, by the name of their side or dimension.
    """
    lines = read_lines(answers)
    prompts = [line["prompt"] for line in lines]

    def scored(texts: Sequence[str]) -> tuple[list[float], list[bool]]:
        if catalogue is None:
            return [float(len(answer.split())) for answer in texts], [True] * len(texts)
        graded = grade(prompts, texts, catalogue, [side], scorers=scorers)
        return [answer.toward[side] for answer in graded], [answer.valid for answer in graded]

    steps = [scored([line["steps"][at] for line in lines]) for at in range(sweep.num_steps)]
    base, _ = scored([line["base"] for line in lines])
    points = [(share, sum(scores) / len(scores)) for share, (scores, _) in zip(sweep.shares, steps, strict=True)]
    intervals = [bootstrap_interval(scores) for scores, _ in steps]
    return {
        "low": sweep.low,
        "high": sweep.high,
        "scale": sweep.scale,
        "score": "words" if catalogue is None else f"score towards {side}",
        "num_prompts": len(lines),
        "base": sum(base) / len(base),
        "points": points,
        "intervals": intervals,
        "valid": [sum(valid) / len(valid) for _, valid in steps],
        "verdict": str(judge_sweep(points, intervals)),
    }


def draw_sweep(results: Mapping[str, Any], path: Path) -> Path:
    """Draw the results of `score_sweep` as a PNG file, and return its path.

    Raises:
        UsageError: if matplotlib is missing.
    """
    is_share = results["score"] != "words"
    times = "" if results["scale"] == 1 else f"{results['scale']:g} "
    most = max([results["base"], *(high for _, high in results["intervals"])])
    return draw_curve(
        Curve(
            note=f"{results['high']} weighs {times}w, {results['low']} weighs {times}(1 - w)",
            low=results["low"],
            high=results["high"],
            score=results["score"],
            points=results["points"],
            base=results["base"],
            intervals=results["intervals"],
            top=1.0 if is_share else _round_up(most),
        ),
        path,
    )


def _round_up(value: float) -> float:
    """Return a round number at or above `value`, for the end of an axis that counts words."""
    step = 10
    while value > 10 * step:
        step *= 10
    return float(max(step, -(-value // step) * step))
