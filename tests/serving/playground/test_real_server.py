"""The playground on the server itself: what it shows is the model's, what it saves is the store's."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.settings import ApiKey, Rules, Settings
from personalized_soups.tiny import BASE_FOLDER
from personalized_soups.users.profiles.store import UnknownProfile
from tests.experts import write_expert
from tests.serving.playground.conftest import Playground
from tests.serving.servers import RunningServer, running
from tests.serving.web.routes.pools import pool_of

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PROMPT = "How do I clean an old kettle?"
SIDES = {"elementary": "expertise", "expert": "expertise", "concise": "informativeness",
         "informative": "informativeness", "friendly": "style", "unfriendly": "style"}  # fmt: skip
KEY = "sk-of-the-test-0815-4711"


@pytest.fixture(scope="module")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "experts"
    shapes = {f"model.layers.{layer}.mlp.up_proj": (384, 128) for layer in range(4)}
    for seed, side in enumerate(SIDES):
        write_expert(folder / side, seed=seed, rank=2, alpha=4, shapes=shapes)
    return folder


@pytest.fixture(scope="module")
def real(tiny_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    catalogue = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
    store = tmp_path_factory.mktemp("kept") / "profiles.db"
    settings = Settings("tiny", limits=Limits(max_context=512))
    pool = pool_of(tiny_experts, dimensions=SIDES)
    with running(BASE_FOLDER, tiny_experts, settings, profiles=store, catalogue=catalogue, pool=pool) as served:
        yield served


@pytest.fixture
def served_url(real: RunningServer) -> str:
    return real.url


def _greedy(playground: Playground) -> None:
    playground.page.locator("summary").first.click()
    playground.page.get_by_label("Temperature").fill("0")


def _own(real: RunningServer, weights: dict[str, float] | None) -> str:
    answer: str = real.model.generate([PROMPT], [weights], max_new_tokens=256)[0]
    return answer


def test_what_is_shown_is_what_the_model_says_and_how_it_is_scored(playground: Playground, real: RunningServer) -> None:
    playground.open()
    _greedy(playground)
    playground.page.locator("#preset").select_option("base")
    playground.slider("expertise").fill("0.5")
    playground.slider("style").fill("0.8")
    playground.ask(PROMPT)
    weights = {"expert": 0.5, "friendly": 0.8}
    assert playground.answer(0).strip() == _own(real, None)
    assert playground.answer(1).strip() == _own(real, weights)
    reply = real.ask("POST", "/v1/scores", {"prompt": PROMPT, "answers": [_own(real, weights)]})
    rows = reply.json["data"][0]
    assert len(rows) == 3
    shown = playground.page.locator("article").nth(1).inner_text()
    if all(row["is_valid"] for row in rows):
        assert all(f"{row['value']:.2f}" in shown for row in rows)
    else:
        assert "not a valid answer" in shown.lower()
    playground.slider("style").fill("-0.8")
    playground.settled()
    assert playground.answer(1).strip() == _own(real, {"expert": 0.5, "unfriendly": 0.8})
    assert playground.complaints == []
    assert {request.url.split("/")[2] for request in playground.requests} == {real.url.split("/")[2]}


def test_a_mixture_is_saved_and_compared_with_another_one(playground: Playground, real: RunningServer) -> None:
    assert real.store is not None
    playground.open()
    _greedy(playground)
    for name, position in (("ada", "0.9"), ("née / 😀", "-0.9")):
        playground.page.locator("#preset").select_option("base")
        playground.slider("informativeness").fill(position)
        playground.page.fill("#user", name)
        playground.page.get_by_role("button", name="Save as profile").click()
        expect(playground.page.locator("#keep-note")).to_contain_text("Saved as")
    assert real.store.get("ada").profile.weights == {"informative": 0.9}
    assert real.store.get("née / 😀").profile.weights == {"concise": 0.9}
    selects = playground.page.locator("article select")
    selects.nth(0).select_option("user:ada")
    selects.nth(1).select_option("user:née / 😀")
    playground.ask(PROMPT)
    assert playground.answer(0).strip() == _own(real, {"informative": 0.9})
    assert playground.answer(1).strip() == _own(real, {"concise": 0.9})
    assert [body["model"] for body in playground.asked()] == ["soup:ada", "soup:née / 😀"]
    assert playground.complaints == []


def test_saved_profiles_are_found_restored_and_deleted(playground: Playground, real: RunningServer) -> None:
    assert real.store is not None
    name = "Zoë / 1"
    for weight in (0.25, 0.5):
        real.store.put(Profile(user=name, weights={"expert": weight}))
    real.store.put(Profile(user="another", weights={"expert": 1.0}))  # so that the search changes the list
    playground.open()
    page = playground.page
    expect(page.locator("#found > li")).to_have_count(len(real.store.page()))  # other tests may have saved some
    page.fill("#find", "zo")
    expect(page.locator("#found > li")).to_have_count(1)
    page.locator("#found summary").click()
    page.get_by_role("button", name=f"Restore version 1 of {name}").click()
    expect(page.locator("#found [role=status]")).to_contain_text("is a copy of version 1")
    assert [each.profile.weights["expert"] for each in real.store.history(name)] == [0.25, 0.5, 0.25]
    page.get_by_role("button", name=f"Delete {name}").click()
    page.get_by_role("button", name="Delete it").click()
    expect(page.locator("#found > li")).to_have_count(0)
    with pytest.raises(UnknownProfile):
        real.store.get(name)
    real.store.delete("another")
    assert playground.complaints == []


def test_ten_answers_set_the_sliders_and_are_kept_until_they_are_deleted(
    playground: Playground, real: RunningServer
) -> None:
    assert real.store is not None
    name = "Zoë / questions"
    playground.open()
    page = playground.page
    title = page.locator("#taste-title")
    page.locator("#find-taste").click()
    page.fill("#taste-user", name)
    page.keyboard.press("Enter")
    for number in range(1, 11):
        expect(title).to_have_text(f"Question {number} of 10")
        answers = {f"#taste-{place}": page.locator(f"#taste-{place}").inner_text() for place in ("first", "second")}
        # the user likes the answers of one name, wherever they are shown
        page.keyboard.press("1" if answers["#taste-first"].startswith("First") else "2")
    expect(title).to_have_text("What you prefer")
    stored = real.store.answers.of(name)
    assert [each.answer.choice for each in stored] == ["a"] * 10
    assert {each.answer.swapped for each in stored} == {True, False}
    page.get_by_role("button", name="Use these").click()
    expect(page.locator("#preset-note")).to_contain_text("saved as")
    weights = real.store.get(name).profile.weights
    shown = page.evaluate(
        "[...document.querySelectorAll('#sliders input')].map((each) => [each.ariaLabel, each.value])"
    )
    for label, value in shown:
        low, high = label.split(": ")[1].split(" to ")
        assert float(value) == pytest.approx(weights.get(high, 0) - weights.get(low, 0))
    page.locator("#find-taste").click()
    page.get_by_role("button", name="Start").click()
    expect(title).to_have_text("What you prefer")
    page.get_by_role("button", name="Delete my answers").click()
    page.get_by_role("button", name="Delete them").click()
    expect(title).to_have_text("Find my taste")
    assert real.store.answers.of(name) == []
    assert real.store.get(name).profile.weights == weights
    real.store.delete(name)
    assert playground.complaints == []


def test_the_copied_curl_runs_and_the_command_is_one_that_there_is(playground: Playground, real: RunningServer) -> None:
    playground.open()
    _greedy(playground)
    playground.page.fill("#prompt", PROMPT)
    texts = {}
    for kind in ("curl", "command"):
        playground.page.locator(f"[data-copy={kind}]").click()
        expect(playground.page.locator("#keep-note")).to_contain_text("Copied")
        texts[kind] = playground.page.evaluate("navigator.clipboard.readText()")
    found = subprocess.run(["sh", "-c", texts["curl"]], capture_output=True, text=True, check=True).stdout
    events = [line.removeprefix("data: ") for line in found.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks: list[Any] = [json.loads(event) for event in events[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    weights = {"elementary": 0.6, "concise": 0.6, "friendly": 0.6}  # the page's first preset
    assert text.strip() == _own(real, weights)
    command = shlex.split(texts["command"])
    assert command[:2] == ["psoups", "generate"]
    _check_options(command[2:])


def _check_options(arguments: list[str]) -> None:
    """See that the command line takes them: it parses all options before it prints its help."""
    from typer.testing import CliRunner

    from personalized_soups.cli.app import build_app

    message = CliRunner().invoke(build_app(), ["generate", *arguments, "--help"])
    assert message.exit_code == 0, message.output


def test_a_key_is_asked_for_and_opens_the_sliders(
    browser: Any, tiny_experts: Path, request: pytest.FixtureRequest
) -> None:
    settings = Settings("tiny", rules=Rules(keys=[ApiKey(KEY)]), limits=Limits(max_context=512))
    with running(BASE_FOLDER, tiny_experts, settings) as served:
        context = browser.new_context()
        opened = Playground(context, context.new_page(), served.url)
        opened.page.goto(f"{served.url}/playground/")
        opened.page.locator("#key-input").fill(KEY)
        opened.page.locator("#key-input").press("Enter")
        opened.page.wait_for_selector("#sliders[aria-busy=false]")
        opened.ask(PROMPT)
        assert opened.answer(1)
        assert opened.page.get_by_text("--profiles profiles.db").is_visible()  # there is no store
        stored = opened.page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
        assert KEY not in stored
        context.close()
