"""The playground in a browser: when it is first seen, and how many bytes it has loaded."""

from __future__ import annotations

import json
import shutil
import sys

from benchmarks.crowd import server

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(experts: str) -> None:
    """Print the seconds until the first paint that has content, and the bytes of everything loaded."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(json.dumps({"missing": "no Chromium here"}))
        return
    from playwright.sync_api import sync_playwright

    with server(experts) as (port, _), sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        page = playwright.chromium.launch(executable_path=browser, args=options).new_page()
        page.goto(f"http://127.0.0.1:{port}/playground/", wait_until="networkidle")
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        num_bytes = page.evaluate("performance.getEntries().reduce((sum, entry) => sum + (entry.transferSize || 0), 0)")
    print(json.dumps({"seconds": paint / 1e3, "paint": paint / 1e3, "num_bytes": num_bytes}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
