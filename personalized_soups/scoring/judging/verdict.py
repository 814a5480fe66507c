"""Read a verdict from a judge's reply."""

from __future__ import annotations

import re

from personalized_soups.declare.preference_data import Verdict

# Matches lines such as B, **B**, Verdict: A. and Answer B.
_VERDICT = re.compile(
    r"\W*(?:(?:final\s+)?(?:verdict|answer|winner|result)\b(?:\s+is\b)?\W*)?(?:(?:answer|option)\s+)?(a|b|tie)\W*",
    re.IGNORECASE,
)
_MEANINGS: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}


def read_verdict(reply: str) -> Verdict:
    """Return the verdict in the last line of a reply that is not blank. Anything else is `unparsed`.

    A verdict elsewhere in the text is not searched: reasoning often names both answers.

    Example:
        >>> read_verdict("Answer A is shorter.\\n\\n**Verdict: B**")
        'second'
        >>> read_verdict("I prefer answer A over B.")
        'unparsed'
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    match = _VERDICT.fullmatch(lines[-1]) if lines else None
    return _MEANINGS[match[1].lower()] if match else "unparsed"
