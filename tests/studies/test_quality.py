"""The page of several runs shows the figures of the runs."""

from __future__ import annotations

import re

from personalized_soups.studies.quality import quality_page
from tests.studies.test_outcome import results


def test_the_page_has_every_run_its_average_and_what_misses_its_bar() -> None:
    good, worse = results(), results(broken=2)
    page = quality_page({"free": [good, worse], "shared": [good]})
    assert "2 seeds" in page
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in page.splitlines() if line.startswith("| ")]
    best = [row for row in rows if row[:1] == ["free"] and len(row) == 11]
    assert [row[5] for row in best] == ["1.000", "0.750"]  # joint of the best method
    average = next(row for row in rows if row[0] == "**free**" and len(row) == 11)
    assert average[5] == "0.875 ± 0.177"  # 0.25 / sqrt(2)
    valid = next(row for row in rows if row[0].startswith("valid, as a share"))
    assert valid[1:] == ["at least 0.93", "1.000", "**0.750**", "1.000"]
    sweep = next(row for row in rows if row[0] == "sweep of style")
    assert sweep[2:] == ["**1.000**"] * 3  # from score 1 to 0
