"""A browser that is there already, and the playground open in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    # need packages that may be missing: pytest imports this file before it can skip a test
    from playwright.sync_api import Browser, BrowserContext, Page, Request

    from tests.serving.playground.mock import Mock

_NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@dataclass
class Playground:
    """One page on one server, and what was asked and complained of since it was opened."""

    context: BrowserContext
    page: Page
    url: str
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch(self.page)

    def watch(self, page: Page) -> None:
        """Note what a page asks for, and every error that it prints."""
        from playwright.sync_api import expect

        # these only end a hang: a busy machine may be slow
        page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: self.complaints.append(message.text) if message.type in {"error", "warning"} else None,
        )

    def _note(self, request: Request) -> None:
        self.requests.append(request)

    def open(self, fragment: str = "") -> None:
        """Open the page, and wait until the sliders are there."""
        self.page.goto(f"{self.url}/playground/{fragment}")
        self.page.wait_for_selector("#sliders[aria-busy=false]")

    def asked(self) -> list[dict[str, Any]]:
        """Return the bodies of the requests for answers, in order."""
        chats = [request for request in self.requests if request.url.endswith("/chat/completions")]
        return [json.loads(request.post_data or "") for request in chats]

    def settled(self) -> None:
        """Wait until no slider is waiting and no answer is under way."""
        # The page's own timers fire in order: this one is due after the one of a slider that was moved before.
        self.page.evaluate("() => new Promise((done) => setTimeout(done, 450))")
        self.page.wait_for_selector("#stop", state="hidden")

    def ask(self, prompt: str = "How do I clean an old kettle?") -> None:
        """Ask, and wait for both answers."""
        self.page.fill("#prompt", prompt)
        self.page.click("#ask")
        self.page.wait_for_selector("#stop", state="hidden")

    def slider(self, name: str) -> Any:
        """Return the slider of a dimension or of an extra expert."""
        return self.page.locator(f'input[type=range][aria-label^="{name}"]')

    def answer(self, at: int) -> str:
        """Return the text of the left (0) or right (1) answer."""
        return self.page.locator("article .answer > p").nth(at).inner_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield a Chromium. It lasts a module: as long as it runs, no other event loop can be started in this thread."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=_ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def mock_server() -> Iterator[tuple[Mock, str]]:
    """Yield the module's one server, and its address."""
    from tests.serving.playground.mock import Mock, application, served

    mock = Mock()
    with served(application(mock)) as url:
        yield mock, url


@pytest.fixture
def mock(mock_server: tuple[Mock, str]) -> Mock:
    """Return what the server does, as new; a test may change it before it opens the page, or after."""
    vars(mock_server[0]).update(vars(type(mock_server[0])()))
    return mock_server[0]


@pytest.fixture
def served_url(mock_server: tuple[Mock, str], mock: Mock) -> str:
    """Return the address of a server that has the page and its interface."""
    return mock_server[1]


@pytest.fixture
def playground(browser: Browser, served_url: str) -> Iterator[Playground]:
    """Yield the playground, not opened yet, in a browser without a memory."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=served_url)
    yield Playground(context, context.new_page(), served_url)
    context.close()


@pytest.fixture
def phone(playground: Playground) -> Iterator[Page]:
    """Yield the page on a phone, not opened yet."""
    browser = playground.context.browser
    assert browser is not None
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, reduced_motion="reduce"
    )
    yield context.new_page()
    context.close()
