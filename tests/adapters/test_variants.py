from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from personalized_soups.adapters.variants import HARMLESS, MOVING_INITS, PLAIN_INITS, READ, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "adapters.md"


def rows() -> dict[str, str]:
    """Return the page's line on each key."""
    table = PAGE.read_text().split("## Every key of adapter_config.json")[1].split("\n## ")[0]
    found = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            _, keys, said, _ = line.split("|", 3)
            found.update(dict.fromkeys(re.findall(r"`(\w+)`", keys), said.strip()))
    return found


def test_every_key_of_pefts_configuration_is_sorted() -> None:
    from peft import LoraConfig

    known = READ | HARMLESS | REFUSED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} - known == set()
    assert len(known) == len(READ) + len(HARMLESS) + len(REFUSED), "a key is in two tables"


def test_the_page_names_every_key_and_says_what_is_refused() -> None:
    said = rows()
    assert said.keys() == READ | HARMLESS | REFUSED.keys()
    assert {key for key, text in said.items() if text.startswith("refused")} == REFUSED.keys()
    assert {key for key, text in said.items() if text.startswith("of no bearing")} >= HARMLESS
    for init in (*(init for init in PLAIN_INITS if isinstance(init, str)), *MOVING_INITS):
        assert init in said["init_lora_weights"]
