from __future__ import annotations

from itertools import product

import pytest

from personalized_soups.evaluation.results import CombinationScores, Examples, Results

SIDES = {
    "expertise": ["elementary", "expert"],
    "informativeness": ["concise", "informative"],
    "style": ["unfriendly", "friendly"],
}
JOINT = {
    "linear": [0.81, 0.78, 0.58, 0.61, 0.76, 0.722, 0.55, 0.59],
    "factor_average": [0.71, 0.69, 0.49, 0.52, 0.66, 0.64, 0.47, 0.50],
    "factor_linear": [0.62, 0.60, 0.38, 0.41, 0.58, 0.55, 0.36, 0.40],
}
WEIGHTS = {"linear": 0.55, "factor_average": 2.2, "factor_linear": 0.8}
BASE_JOINT = [0.14, 0.11, 0.09, 0.10, 0.13, 0.12, 0.08, 0.11]


def _combination(method: str, at: int, sides: tuple[str, ...]) -> CombinationScores:
    joint = JOINT[method][at]
    mean = 0.62 + 0.36 * joint
    win = round(0.55 + 0.45 * joint, 3)
    return {
        "sides": list(sides),
        "method": method,
        "weight": WEIGHTS[method],
        "mean": mean,
        "joint": joint,
        "valid": 0.955 - 0.01 * (at % 3),
        "per_dimension": {"expertise": mean + 0.07, "informativeness": mean - 0.11, "style": mean + 0.04},
        "win_rate_vs_base": win,
        "win_rate_interval": [win - 0.043, win + 0.037],
        "base_joint": BASE_JOINT[at],
    }


@pytest.fixture
def results() -> Results:
    """Return results like those of the tiny base: eight combinations by three methods, and three sweeps."""
    combinations = [
        _combination(method, at, sides) for method in JOINT for at, sides in enumerate(product(*SIDES.values()))
    ]
    weights = [step / 10 for step in range(11)]
    rise = [0.0, 0.02, 0.06, 0.14, 0.28, 0.46, 0.63, 0.78, 0.88, 0.94, 0.96]
    sweeps = {
        "expertise": [[w, 0.02 + 0.97 * r] for w, r in zip(weights, rise, strict=True)],
        "informativeness": [[w, 0.13 + 0.66 * r] for w, r in zip(weights, rise, strict=True)],
        "style": [[w, 0.04 + 0.94 * r] for w, r in zip(weights, rise, strict=True)],
    }
    sweeps["informativeness"][10][1] -= 0.019
    return {
        "base": {
            "mean": 0.487,
            "joint": 0.11,
            "valid": 0.974,
            "per_dimension": {"expertise": 0.503, "informativeness": 0.446, "style": 0.512},
            "distinct_bigrams": 0.312,
        },
        "combinations": combinations,
        "selection": [
            {"method": method, "weight": weight * scale, "mean": 0.8, "joint": joint - loss, "valid": 0.95}
            for (method, weight), joint in zip(WEIGHTS.items(), (0.69, 0.6, 0.5), strict=True)
            for scale, loss in ((0.5, 0.2), (1.0, 0.0), (2.0, 0.35))
        ],
        "methods": [
            {
                "method": method,
                "weight": WEIGHTS[method],
                "mean": sum(row["mean"] for row in combinations if row["method"] == method) / 8,
                "joint": sum(JOINT[method]) / 8,
                "valid": 0.946,
                "win_rate_vs_base": sum(row["win_rate_vs_base"] for row in combinations if row["method"] == method) / 8,
                "distinct_bigrams": 0.287,
            }
            for method in JOINT
        ],
        "sweeps": sweeps,
        "sweep_intervals": {
            dimension: [[max(0.0, score - 0.035), min(1.0, score + 0.035)] for _, score in points]
            for dimension, points in sweeps.items()
        },
        "sides": SIDES,
        "best_method": "linear",
        "num_prompts": 96,
        "num_samples": 1,
        "seconds": {"pairs": 31.24, "train": 171.96, "merge": 2.1, "evaluate": 74.2},
        "seed": 7,
        "basis": "free",
        "checks": [
            {"name": "base valid and on topic, at least", "value": 0.974, "bar": 0.95, "met": True},
            {"name": "base expertise, within", "value": 0.503, "bar": [0.4, 0.6], "met": True},
            {"name": "joint score, at least", "value": 0.6496, "bar": 0.65, "met": False},
        ],
        "versions": {"personalized_soups": "0.1.0", "torch": "2.13.0"},
        "files": {"results": "results.json", "the combinations": "combinations.png", "experts": "my experts/"},
    }


@pytest.fixture
def examples() -> Examples:
    return {
        "prompt": "How do I clean an old kettle?",
        "answers": [
            {"name": "base", "answer": "Wash the old kettle with warm water. Rub it dry."},
            {"name": "elementary + concise + friendly", "answer": "Sure, my friend!\nWash the *old* kettle | enjoy!"},
        ],
    }
