"""The Python blocks of README and pages run, page by page, in one namespace each.

A block with a caption is a file. A block `python server` runs against a server, `python no-run` does not run: it shows
another library, or needs another machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, ROOT, Block, blocks

PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
# These pages have tests of their own, which install their packages too.
ELSEWHERE = {"add_a_method.md": "tests/docs/test_add_a_method.py", "add_a_scorer.md": "tests/scoring/test_plugins.py"}
WITH_PYTHON = [
    page for page in PAGES if page.name not in ELSEWHERE and any(block.kind == "python" for block in blocks(page))
]


def _run(page: Path, block: Block, namespace: dict[str, Any], text: str | None = None) -> None:
    # as many lines as stand before the block, so that a traceback names the page's line
    source = "\n" * block.line + (block.text if text is None else text)
    exec(compile(source, str(page), "exec", dont_inherit=True), namespace)


def test_a_block_that_fails_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\nassert x == 2\n```\n", encoding="utf-8")
    (block,) = blocks(page)
    with pytest.raises(AssertionError) as caught:
        _run(page, block, {})
    assert caught.traceback[-1].lineno + 1 == 5


def test_pages_with_tests_of_their_own_are_in_those() -> None:
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / test).read_text(encoding="utf-8")


def test_pages_with_python_are_found() -> None:
    names = {page.name for page in WITH_PYTHON}
    assert {"README.md", "mixing.md", "live.md", "from_peft.md", "store_profiles.md"} <= names


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, workplace: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.caption is not None:
            (workplace / block.caption).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            _run(page, block, namespace)


def test_the_python_that_needs_a_server_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from personalized_soups import TINY_BASE
    from personalized_soups.serving.engine.limits import Limits
    from personalized_soups.serving.web.settings import Settings
    from tests.serving.servers import running

    page = DOCS / "howto" / "serve.md"
    (block,) = (block for block in blocks(page) if block.kind == "server")
    settings = Settings("tiny", limits=Limits(max_context=512))
    with running(TINY_BASE, workplace / "experts", settings, profiles=workplace / "p.db") as server:
        namespace: dict[str, Any] = {}
        _run(page, block, namespace, block.text.replace("http://127.0.0.1:8000", server.url))
        namespace["client"].close()
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_commands_about_questions_run(workplace: Path) -> None:
    from personalized_soups import TINY_BASE
    from personalized_soups.serving.engine.limits import Limits
    from personalized_soups.serving.web.settings import Settings
    from tests.serving.servers import running
    from tests.serving.web.routes.pools import pool_of

    asking, finishing = (
        block.text for block in blocks(DOCS / "howto" / "serve.md") if block.kind == "bash" and "$URL" in block.text
    )
    pool = pool_of(workplace / "experts", dimensions={"friendly": "style", "unfriendly": "style"})
    settings = Settings("tiny", limits=Limits(max_context=512))
    with running(TINY_BASE, workplace / "experts", settings, profiles=workplace / "p.db", pool=pool) as server:
        script = asking.replace("http://127.0.0.1:8000", server.url) + finishing
        script = script.replace("python -c", f"{sys.executable} -c").replace("curl -s", "curl -sf -w '\\n'")
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    first, answered, written, back = (json.loads(line) for line in done.stdout.splitlines() if line)
    assert first["question"] == back["question"] != answered["question"]
    assert (first["num_answered"], answered["num_answered"], back["num_answered"]) == (0, 1, 0)
    assert written["profile"] == answered["estimate"]["profile"]
