"""What a way needs of this project, found by name, so that a way whose work is not there yet says so and no more."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any


def found(module: str, name: str) -> Any:
    """Return what `module` calls `name`; where there is none, print so and end the process."""
    try:
        return getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        return give_up(f"not there yet: {module}.{name}")


def give_up(reason: str) -> Any:
    """Print why the way cannot be gone on this machine, and end the process."""
    print(json.dumps({"missing": reason}))
    sys.exit(0)
