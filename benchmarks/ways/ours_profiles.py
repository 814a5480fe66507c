"""This project: many profiles into a store (SQLite) by the command, then looked up; sqlite3 alone with the same rows.

All files are in the page cache, so the figures are those of the work and not of the disk.
"""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.shapes import NUM_EXPERTS
from personalized_soups.users.profiles.store import ProfileStore

_LOOKUPS = 20_000
_PERCENTILE = 0.99


def main(count: int, out: str) -> None:
    """Print the seconds of both imports, and those of a lookup that 99 in 100 stay below, of both."""
    folder = Path(out)
    folder.mkdir()
    dice = random.Random(0)
    users = [f"u{number}" for number in range(count)]
    dice.shuffle(users)
    lines = folder / "users.jsonl"
    with lines.open("w", encoding="utf-8") as file:
        for user in users:
            weights = {f"e{expert}": round(dice.uniform(-1, 1), 3) or 0.5 for expert in range(NUM_EXPERTS)}
            file.write(json.dumps({"user": user, "weights": weights}) + "\n")
    asked = [dice.choice(users) for _ in range(_LOOKUPS)]

    start = time.perf_counter()
    command = ["profile", "import", str(lines), "--profiles", str(folder / "profiles.db")]
    subprocess.run([sys.executable, "-m", "personalized_soups", *command], check=True, stdout=subprocess.DEVNULL)
    import_s = time.perf_counter() - start
    with ProfileStore.open(folder / "profiles.db", create=False) as store:
        lookup_s = _percentile(store.get, asked)

    start = time.perf_counter()
    plain = _plain_import(lines, folder / "plain.db")
    plain_import_s = time.perf_counter() - start
    select = "SELECT document FROM profiles WHERE user = ?"
    plain_lookup_s = _percentile(lambda user: json.loads(plain.execute(select, (user,)).fetchone()[0]), asked)
    plain.close()
    print(json.dumps({
        "import_seconds": import_s,
        "lookup_seconds": lookup_s,
        "plain_import_seconds": plain_import_s,
        "plain_lookup_seconds": plain_lookup_s,
    }))  # fmt: skip


def _plain_import(lines: Path, path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE profiles (user TEXT PRIMARY KEY, document TEXT NOT NULL) WITHOUT ROWID")
    with lines.open(encoding="utf-8") as file:
        rows = ((json.loads(line)["user"], line) for line in file)
        connection.executemany("INSERT INTO profiles VALUES (?, ?)", rows)
    connection.commit()
    return connection


def _percentile(look_up: Callable[[str], object], users: list[str]) -> float:
    for user in users:
        look_up(user)
    seconds = []
    for user in users:
        start = time.perf_counter()
        look_up(user)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[int(_PERCENTILE * len(seconds))]


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
