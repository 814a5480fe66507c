"""`make gpu`: run the tests and benchmark rows that need a GPU; write the table into docs/explanation/benchmarks.md.

python -m benchmarks.gpu [--only mixing-gpu] [--shape tiny] [--page docs/explanation/benchmarks.md]

The work is cut into stages. Each runs in a process group of its own with a time limit, so a stage that hangs loses its
own result and no other. A stage's limit is its share of the whole time plus what earlier stages left over; the shares
add up to less than six minutes. Nothing is installed: tests of packages that are missing are skipped, by name. The last
line on stdout is one JSON object with every stage and every row. The exit status is 0 if all stages passed, 1 if one
did not, 2 without a GPU.
"""

from __future__ import annotations

import sys

from benchmarks.gpu.card import missing_card


def main() -> int:
    """Run the stages, if there is a GPU."""
    if fault := missing_card():
        print(fault, file=sys.stderr)
        return 2
    # imports PyTorch, which may be missing
    from benchmarks.gpu import report

    return report.main()


if __name__ == "__main__":
    sys.exit(main())
