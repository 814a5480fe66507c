"""Personalized Soups: train one LoRA expert per preference, merge a personal model for any mixture of them.

The public names are resolved on first use, so that importing the package loads neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from personalized_soups.errors import SoupError

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.profile import Profile, load_profile
    from personalized_soups.merging.live.adapter import LiveAdapter
    from personalized_soups.merging.writing.adapter import merge
    from personalized_soups.merging.writing.into_base import merge_into_base
    from personalized_soups.merging.writing.many import merge_many
    from personalized_soups.mixing.model import SoupModel

__version__ = "0.1.0"

__all__ = [
    "ExpertLibrary",
    "LiveAdapter",
    "Profile",
    "SoupError",
    "SoupModel",
    "__version__",
    "load_profile",
    "merge",
    "merge_into_base",
    "merge_many",
]

_HOME = {
    "ExpertLibrary": "personalized_soups.adapters.library",
    "LiveAdapter": "personalized_soups.merging.live.adapter",
    "Profile": "personalized_soups.declare.profile",
    "SoupModel": "personalized_soups.mixing.model",
    "load_profile": "personalized_soups.declare.profile",
    "merge": "personalized_soups.merging.writing.adapter",
    "merge_into_base": "personalized_soups.merging.writing.into_base",
    "merge_many": "personalized_soups.merging.writing.many",
}


def __getattr__(name: str) -> object:
    """Import the module in which a public name lives, once the name is used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
