"""Write the results of the study: means over seeds and users, targets, a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

from personalized_soups.evaluation.markdown import table
from personalized_soups.evaluation.pictures.answer_curves import AnswerCurve, AnswerPanel, draw_answer_curves
from personalized_soups.evaluation.results import Check
from personalized_soups.studies.elicitation.rows import IMPLICIT, RANDOM, RULES
from personalized_soups.studies.elicitation.study import ElicitationStudy, SeedResults
from personalized_soups.studies.elicitation.systems import COUNTS

PICTURE = "elicitation"
_DECLARED, _UNIFORM, _BASE = "declared weights", "uniform soup", "base"


def mean_agreement(seeds: Sequence[SeedResults], row: str, count: int) -> float:
    """Return the mean over seeds and users of the share of held-out pairs in the right order."""
    return fmean(value for seed in seeds for value in seed["agreement"][row][str(count)])


def gain_share(seeds: Sequence[SeedResults], row: str, count: int) -> float:
    """Return the gain of a row's soups over the base, as a share of the gain of the soups of the declared weights."""
    gain = fsum(_gains(seeds, row, count))
    return gain / fsum(_gains(seeds, _DECLARED, 0))


def margin_at_five(seeds: Sequence[SeedResults]) -> tuple[float, float]:
    """Return how much more active questions tell than random ones after 5 answers, and its standard error."""
    differences = [
        active - random
        for seed in seeds
        for active, random in zip(seed["agreement"][IMPLICIT]["5"], seed["agreement"][RANDOM]["5"], strict=True)
    ]
    return fmean(differences), stdev(differences) / sqrt(len(differences))


def _gain_error(seeds: Sequence[SeedResults]) -> float:
    """Return the standard error, over users, of the share of the gain after 10 active answers: a ratio of two means."""
    share = gain_share(seeds, IMPLICIT, 10)
    gains, declared = _gains(seeds, IMPLICIT, 10), _gains(seeds, _DECLARED, 0)
    residuals = [gain - share * most for gain, most in zip(gains, declared, strict=True)]
    return stdev(residuals) / sqrt(len(residuals)) / abs(fmean(declared))


def checks(seeds: Sequence[SeedResults]) -> list[Check]:
    """Return every target with its measured value, its bar, and whether the value meets the bar."""
    margin, error = margin_at_five(seeds)
    after_ten = mean_agreement(seeds, IMPLICIT, 10)
    gain = gain_share(seeds, IMPLICIT, 10)
    inside = [fmean(seed["calibration"]["inside"][str(count)] for seed in seeds) for count in COUNTS]
    return [
        Check(name="agreement after 10 answers", value=after_ten, bar=0.85, met=after_ten >= 0.85),
        Check(
            name="agreement after 5 answers: active minus random",
            value=margin,
            bar=f"above {2 * error:.3f}, twice its standard error",
            met=margin > 2 * error,
        ),
        Check(name="gain of the soup after 10 answers, share of the declared", value=gain, bar=0.85, met=gain >= 0.85),
        Check(
            name="90% intervals that hold the truth, least over the numbers of answers",
            value=min(inside),
            bar=[0.85, 0.95],
            met=0.85 <= min(inside) <= 0.95,
        ),
        Check(
            name="90% intervals that hold the truth, greatest",
            value=max(inside),
            bar=[0.85, 0.95],
            met=0.85 <= max(inside) <= 0.95,
        ),
    ]


def summary(study: ElicitationStudy, seeds: Sequence[SeedResults]) -> dict[str, Any]:
    """Return the content of results.json."""
    return {
        **study.settings(),
        "num_seeds": len(seeds),
        "agreement": {
            row: {str(count): mean_agreement(seeds, row, count) for count in COUNTS} for row in seeds[0]["agreement"]
        },
        "gain_share": {
            row: {count: gain_share(seeds, row, int(count)) for count in counts}
            for row, counts in seeds[0]["rewards"].items()
        },
        "kinds": {
            kind: {str(count): fmean(seed["kinds"][kind][str(count)] for seed in seeds) for count in COUNTS}
            for kind in seeds[0]["kinds"]
        },
        "calibration": {
            figure: {str(count): fmean(seed["calibration"][figure][str(count)] for seed in seeds) for count in COUNTS}
            for figure in ("inside", "width", "expected", "agreement", "error")
        },
        "omitted": seeds[0]["omitted"],
        "checks": checks(seeds),
        "seeds": list(seeds),
    }


def agreement_rows(seeds: Sequence[SeedResults]) -> list[list[str]]:
    """Return the rows of the table of agreement."""
    return [[row, *(f"{mean_agreement(seeds, row, count):.3f}" for count in COUNTS)] for row in seeds[0]["agreement"]]


def gain_rows(seeds: Sequence[SeedResults]) -> list[list[str]]:
    """Return the rows of the table of gains. Soups that do not depend on answers have one figure."""
    rows = []
    for row, counts in seeds[0]["rewards"].items():
        if "0" in counts:
            value = f"{gain_share(seeds, row, 0):.2f}"
            rows.append([row, *[value] * len(COUNTS)])
        else:
            cells = [f"{gain_share(seeds, row, count):.2f}" if str(count) in counts else "" for count in COUNTS]
            rows.append([row, *cells])
    return rows


def report(study: ElicitationStudy, seeds: Sequence[SeedResults], picture: str) -> str:
    """Return the results as a Markdown page.

    Args:
        study: the settings.
        seeds: the results.
        picture: the path of the picture, relative to the page.
    """
    head = ["", *(f"{count} answers" for count in COUNTS)]
    targets = [
        [check["name"], _bar(check), f"{check['value']:.3f}", "yes" if check["met"] else "**no**"]
        for check in checks(seeds)
    ]
    calibration = [
        [name, *(f"{fmean(seed['calibration'][key][str(count)] for seed in seeds):.3f}" for count in COUNTS)]  # type: ignore[literal-required] # the keys of Calibration
        for name, key in (
            ("90% intervals that hold the truth", "inside"),
            ("width, share of the width before any answer", "width"),
            ("error, share of the size of the weights", "error"),
            ("agreement that sessions expect on questions not asked", "expected"),
            ("true agreement on these questions", "agreement"),
        )
    ]
    kinds = [
        [kind, *(f"{fmean(seed['kinds'][kind][str(count)] for seed in seeds):.3f}" for count in COUNTS)]
        for kind in seeds[0]["kinds"]
    ]
    omitted = "\n".join(f"- {row}: {reason}." for row, reason in seeds[0]["omitted"].items())
    parts = [
        "# What a few answers tell",
        _paragraph(
            f"Written by `psoups study elicitation`: {len(seeds)} seeds, each with its own experts, questions and "
            f"{study.num_users} simulated users of each kind, on the embedded base. The users have known preferences "
            "over the three dimensions. Questions are on validation topics, and all figures are on held-out topics. "
            f"Priors and the systems that need known users learn from {study.num_known} other users, who answered "
            f"{study.per_known} questions each."
        ),
        f"![Figures against the number of answers]({picture})",
        "## Targets",
        table(["target", "bar", "measured", "met"], targets, words=1),
        "## Predicted preferences",
        _paragraph(
            "The share of pairs of held-out answers that the predicted reward puts in the same order as the user's "
            "true reward. The users choose without error. A user's true reward comes from scorers, so it has no true "
            "weights over the experts' rewards, and rewards are compared instead. Questions of the active rows are "
            f"chosen by the rule `{RULES[IMPLICIT]}`. The systems that learn from known users get the questions of the "
            "random row."
        ),
        table(head, agreement_rows(seeds), words=1),
        "## Soups",
        _paragraph(
            "The gain in the user's true reward over the base, as a share of the gain of the soup of the declared "
            f"weights. Each soup answers {_prompts(study.num_prompts)}. A system without weights of experts "
            "gets the soup whose rewards are nearest to the rewards that the system predicts. The standard error of "
            f"the active gain after 10 answers, over users, is {_gain_error(seeds):.3f}."
        ),
        table(head, gain_rows(seeds), words=1),
        "## Certainty",
        _paragraph(
            "These users answer by the model that the estimate assumes: their weights over the experts' rewards are "
            "drawn from the prior, and their answers are logistic. A dimension's weight is the difference of the "
            "weights of its two sides, which have nearly opposite rewards. Sessions estimate weights by expectation "
            "propagation, as here, and stop at the agreement that they expect."
        ),
        table(head, calibration, words=1),
        "## Other users",
        _paragraph(
            "Predicted preferences of users who err, change or have a taste outside every dimension, with active "
            "questions. A `changing` user has new weights after 10 answers, and is compared with the current weights. "
            "An `outside` user likes commas, or dislikes them. Long answers have more commas, so experts of length "
            "predict much of this taste."
        ),
        table(head, kinds, words=1),
        *(["## Systems that are not in the tables", omitted] if omitted else []),
    ]
    return "\n\n".join(parts) + "\n"


def draw(seeds: Sequence[SeedResults], path: Path) -> Path:
    """Draw the figures against the number of answers as a PNG file, and return its path.

    Raises:
        UsageError: if matplotlib is missing.
    """
    names = list(seeds[0]["agreement"])
    short = {
        name: name.replace("implicit rewards, ", "").replace("active, no known users", "no known users")
        for name in names
    }
    shares = [
        AnswerCurve(short[name], [(float(count), mean_agreement(seeds, name, count)) for count in COUNTS], at)
        for at, name in enumerate(names)
    ]
    gains = [
        AnswerCurve(
            short[name], [(float(count), gain_share(seeds, name, int(count))) for count in counts], names.index(name)
        )
        for name, counts in seeds[0]["rewards"].items()
        if "0" not in counts
    ]
    panels = [
        AnswerPanel("Predicted preferences", "share of held-out pairs in the right order", shares, [], (0.5, 1.0)),
        AnswerPanel(
            "Gain of the soup",
            "share of the gain of the declared weights",
            gains,
            [("declared", 1.0), ("uniform", gain_share(seeds, _UNIFORM, 0))],
            (min(0.0, gain_share(seeds, _UNIFORM, 0)) - 0.05, 1.15),
        ),
    ]
    return draw_answer_curves("What a few answers tell", "Simulated users with known preferences", panels, path)


def _gains(seeds: Sequence[SeedResults], row: str, count: int) -> list[float]:
    return [
        value - base
        for seed in seeds
        for value, base in zip(seed["rewards"][row][str(count)], seed["rewards"][_BASE]["0"], strict=True)
    ]


def _prompts(count: int) -> str:
    return "1 held-out prompt" if count == 1 else f"{count} held-out prompts"


def _paragraph(text: str) -> str:
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _bar(check: Check) -> str:
    bar = check["bar"]
    if isinstance(bar, str):
        return bar
    return f"at least {bar:g}" if isinstance(bar, int | float) else f"{bar[0]:g} to {bar[1]:g}"
