"""Show what is in a file of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personalized_soups.cli import render


def show_pairs(
    labelled: Sequence[Any], more: Mapping[str, Any], *, side: str, out: Path, num_prompts: int, as_json: bool
) -> None:
    """Print the number of pairs, the mean gap of their scores if they have any, and the difference in length.

    Args:
        labelled: the pairs.
        more: further rows.
        side, out, num_prompts: the side, the file, and the number of prompts whose answers were labelled.
        as_json: whether to print JSON.
    """
    from personalized_soups.training.length_matching import length_difference

    gaps = [pair["chosen_score"] - pair["rejected_score"] for pair in labelled if "chosen_score" in pair]
    words = length_difference(labelled)
    record: dict[str, Any] = {
        "side": side,
        "file": str(out),
        "pairs": len(labelled),
        "prompts": num_prompts,
        **({"mean gap": sum(gaps) / len(gaps)} if gaps else {}),
        "words": f"{words.chosen:.1f} chosen, {words.rejected:.1f} rejected",
        "difference": f"{words.mean:+.1f} words (95%: {words.low:+.1f} to {words.high:+.1f})",
    }
    if as_json:
        record |= {"words": {"chosen": words.chosen, "rejected": words.rejected}}
        record |= {"difference": {"mean": words.mean, "low": words.low, "high": words.high}}
    render.show_record({**record, **more}, as_json=as_json)
