"""The user's cache folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The environment variable that names another cache folder.
VARIABLE = "PSOUPS_CACHE"


def cache_folder() -> Path:
    """Return the folder in which this package keeps what it can make again. The folder need not exist.

    It is the value of PSOUPS_CACHE. Without it, the folder follows the rule of the system: `$XDG_CACHE_HOME/psoups` or
    `~/.cache/psoups`, on macOS `~/Library/Caches/psoups`, and on Windows `%LOCALAPPDATA%\\psoups\\Cache`.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "psoups" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "psoups"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that relative paths must be ignored.
    return (Path(xdg) if xdg.startswith("/") else Path.home() / ".cache") / "psoups"


def reply_cache_file() -> Path:
    """Return the SQLite file in the user's cache folder that stores the replies of LLM judges. It need not exist."""
    return cache_folder() / "judges" / "replies.sqlite"
