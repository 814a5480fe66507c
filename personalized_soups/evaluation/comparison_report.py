"""The parts of the report that compare systems: averages, movements, combinations and other prompts, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from personalized_soups.evaluation.markdown import plain, table
from personalized_soups.evaluation.results import (
    Comparison,
    Interval,
    JudgeReport,
    Results,
    SystemScores,
    name_of,
    title_of,
)


def averages_table(comparison: Comparison, best_method: str, judges: Mapping[str, JudgeReport] | None = None) -> str:
    """Return the scores of each system, averaged over the combinations, and the best soup's gains over the others.

    `judges` says how good the judges are that the study trained.
    """
    first = comparison["averages"][0]
    dimensions = list(first["per_dimension"])
    has_judges = "judged" in first
    rows = [
        [
            _name(row["system"], best_method),
            *(_with_interval(row[name], row["intervals"][name]) for name in ("joint", "mean", "valid")),
            *(_score(row["per_dimension"][name]) for name in dimensions),
            *(
                [_score(row["judged_joint"]), *(_score(row["judged"][name]) for name in dimensions)]
                if has_judges
                else []
            ),
        ]
        for row in comparison["averages"]
    ]
    head = ["system", "joint [95% interval]", "mean [95% interval]", "valid [95% interval]", *map(plain, dimensions)]
    judged = ["joint, judges", *(f"{plain(name)}, judge" for name in dimensions)] if has_judges else []
    gains = "\n".join(
        f"- over {title_of(gain['over'])}: {_with_interval(gain['joint'], gain['interval'], signed=True)}"
        for gain in comparison["gains"]
    )
    about = (
        "Averages over all combinations. Each score is towards the side that a combination asks for, and an invalid "
        "answer scores 0. Intervals are bootstraps over prompts."
    )
    if has_judges:
        about += " The columns of the judges have the scores by held-out judges, which labelled no pairs."
    for name, judge in (judges or {}).items():
        low, high = judge["auc_interval"]
        about += (
            f" The judge of {plain(name)} is a classifier of {judge['num_answers']} answers of the base under other "
            f"instructions; on held-out prompts its AUC is {judge['auc']:.2f} [{low:.2f}, {high:.2f}]."
        )
    return (
        f"{about}\n\n{table([*head, *judged], rows)}\n\n"
        f"The joint score of the chosen soup (`{best_method}`) minus that of each other system, on the same prompts:"
        f"\n\n{gains}"
    )


def movements_table(comparison: Comparison) -> str:
    """Return, for each combination and dimension, how far the best soup's score is from the base's."""
    movements = comparison["movements"]
    has_judges = all("judged" in movement for movement in movements)
    rows = [
        [
            plain(name_of(movement["sides"])),
            plain(movement["dimension"]),
            _score(movement["base"]),
            _score(movement["soup"]),
            _with_interval(movement["difference"], movement["interval"], signed=True),
            "yes" if movement["moved"] else "**no**",
            *([f"{movement['judged']:+.3f}", "yes" if movement["judged"] > 0 else "**no**"] if has_judges else []),
        ]
        for movement in movements
    ]
    head = ["combination", "dimension", "base", "soup", "difference [95% interval]", "moved"]
    head += ["difference, judge", "moved, judge"] if has_judges else []
    num_moved = sum(movement["moved"] for movement in movements)
    verdict = f"The chosen soup moved {num_moved} of {len(movements)} scores towards the wanted side"
    if has_judges:
        verdict += f", and by the held-out judges {sum(movement['judged'] > 0 for movement in movements)}"
    return f"{verdict}.\n\n{table(head, rows, words=2)}"


def combinations_table(comparison: Comparison) -> str:
    """Return the joint score of each system for each combination, and the expert of each single-expert row."""
    rows = comparison["rows"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    combinations = list(dict.fromkeys(tuple(row["sides"]) for row in rows))
    by_key: dict[tuple[str, tuple[str, ...]], SystemScores] = {
        (row["system"], tuple(row["sides"])): row for row in rows
    }
    cells = [[plain(name_of(sides)), *(_joint(by_key[system, sides]) for system in systems)] for sides in combinations]
    what = f"Joint scores with 95% intervals, on {comparison['num_prompts']} prompts for each combination."
    return f"{what}\n\n{table(['combination', *map(title_of, systems)], cells)}"


def external_sections(results: Results) -> str:
    """Return the comparison on each file of other prompts, or '' if there are none."""
    parts = []
    for name, external in results.get("external", {}).items():
        num_moved = sum(movement["moved"] for movement in external["movements"])
        parts.append(
            f"### {plain(name)}\n\n{external['num_prompts']} of the {external['num_in_file']} prompts of "
            f"{plain(external['file'])}, drawn at random. "
            f"{external['num_skipped']} prompts were too long and left out. Nothing was chosen on these prompts. "
            f"The chosen soup moved {num_moved} of {len(external['movements'])} scores "
            f"towards the wanted side.\n\n{averages_table(external, results['best_method'])}\n\n"
            f"{combinations_table(external)}"
        )
    return "\n\n".join(parts)


def _joint(row: SystemScores) -> str:
    text = _with_interval(row["joint"], row["intervals"]["joint"])
    return f"{text} ({plain(row['expert'])})" if "expert" in row else text


def _name(system: str, best_method: str) -> str:
    title = title_of(system)
    text = f"`{system}`" if title == system and system != "base" else title
    return f"**{text}**" if system == best_method else text


def _with_interval(value: float, interval: Interval | Sequence[float], *, signed: bool = False) -> str:
    low, high = interval
    sign = "+" if signed else ""
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _score(value: float) -> str:
    return f"{value:.3f}"
