"""Write the answers of all systems to some prompts side by side, as a page for reading."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.evaluation.comparison import BASE
from personalized_soups.evaluation.markdown import plain, table
from personalized_soups.evaluation.results import name_of, title_of
from personalized_soups.studies.outcome import HeldOut
from personalized_soups.studies.study import Combination


def samples_page(held_out: HeldOut, combinations: Sequence[Combination], *, num_prompts: int = 4) -> str:
    """Return a Markdown page with the answers to the first `num_prompts` test prompts. Nothing is selected.

    Each prompt has a table with a row for each combination and a column for each system. An answer that is not valid is
    marked.

    Args:
        held_out: the graded answers, by system and combination.
        combinations: the combinations of sides.
        num_prompts: the number of prompts.
    """
    systems = [system for system in dict.fromkeys(system for system, _ in held_out) if system != BASE]
    alone = held_out[BASE, ()]
    parts = [
        "# Answers side by side",
        f"The first {min(num_prompts, len(alone))} test prompts, not selected. *Not valid* marks answers that are "
        "ill-formed or off topic.",
    ]
    for turn, base in enumerate(alone[:num_prompts]):
        parts += [f"## {plain(base.prompt)}", f"**base**: {_shown(base.answer, is_valid=base.valid)}"]
        rows = []
        for sides in combinations:
            entries = [held_out[system, sides][turn] for system in systems]
            rows.append([name_of(sides), *(_shown(entry.answer, is_valid=entry.valid) for entry in entries)])
        parts.append(table(["combination", *map(title_of, systems)], rows, words=1 + len(systems)))
    return "\n\n".join(parts) + "\n"


def _shown(answer: str, *, is_valid: bool) -> str:
    text = plain(answer) or "(empty)"
    return text if is_valid else f"*not valid*: {text}"
