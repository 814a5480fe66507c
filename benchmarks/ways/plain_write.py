"""A plain write: the bytes of one file, held in memory, written to new files."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(file: str, count: int, out: str) -> None:
    """Print the seconds for all files. Each file is opened and closed."""
    data = Path(file).read_bytes()
    Path(out).mkdir()
    start = time.perf_counter()
    for number in range(count):
        with (Path(out) / str(number)).open("wb", buffering=0) as stream:
            done = 0
            while done < len(data):
                done += stream.write(memoryview(data)[done:])
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
