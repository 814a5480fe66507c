"""A set of byte positions in a file, stored as ranges."""

from __future__ import annotations

from bisect import bisect_left


class ByteRanges:
    """A set of ranges `[begin, end)` that do not overlap. Adjacent ranges are merged."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def add(self, begin: int, end: int) -> bool:
        """Add a range and return True. If a part of the range is present already, change nothing and return False."""
        if begin == end:
            return True
        low = high = bisect_left(self._ranges, (begin, end))
        if low and self._ranges[low - 1][1] >= begin:
            low -= 1
            if self._ranges[low][1] > begin:
                return False
            begin = self._ranges[low][0]
        if high < len(self._ranges) and self._ranges[high][0] <= end:
            if self._ranges[high][0] < end:
                return False
            end = self._ranges[high][1]
            high += 1
        self._ranges[low:high] = [(begin, end)]
        return True

    def has(self, begin: int, end: int) -> bool:
        """Return whether all bytes of the range are present."""
        place = bisect_left(self._ranges, (begin + 1,))
        return begin == end or (place > 0 and self._ranges[place - 1][1] >= end)
