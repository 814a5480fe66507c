"""How a way reports that this machine lacks something it needs, such as a GPU."""

from __future__ import annotations

import json
import sys
from typing import NoReturn


def give_up(reason: str) -> NoReturn:
    """Print the reason as the way's report, and end the process."""
    print(json.dumps({"missing": reason}))
    sys.exit(0)
