"""The playground in a real browser: what it sends, shows, keeps, copies, and never does."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
from playwright.sync_api import Page, Request, Route, expect
from ruamel.yaml import YAML

from personalized_soups.declare.profile import Profile
from tests.serving.playground.conftest import Playground
from tests.serving.playground.mock import DIMENSIONS, FOLDER, Mock

pytestmark = pytest.mark.browser

PROMPT = "How do I clean an old kettle?"
NASTY = "<img src=x onerror=\"document.title='taken'\">"
KEY = "sk-never-seen-4711"


def _profile(body: dict[str, Any]) -> dict[str, float]:
    weights: dict[str, float] = body.get("profile", {"weights": {}})["weights"]
    return weights


def _copied(playground: Playground, name: str) -> str:
    playground.page.get_by_role("button", name=f"Copy as {name}").click()
    expect(playground.page.locator("#keep-note")).to_contain_text("Copied")
    text: str = playground.page.evaluate("navigator.clipboard.readText()")
    return text


def _ask_for_a_key(page: Page) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == f"Bearer {KEY}":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no or a wrong key"}})

    page.route("**/v1/**", guard)


# ---- mixing and asking ----------------------------------------------------------------------------------------------


def test_nothing_is_asked_before_somebody_does(playground: Playground) -> None:
    playground.open()
    playground.page.wait_for_timeout(500)
    assert playground.asked() == []


def test_an_example_prompt_is_answered_by_the_base_and_by_the_mixture(playground: Playground) -> None:
    playground.open()
    playground.page.locator("#preset").select_option(label="expert + concise + unfriendly")
    playground.page.get_by_role("button", name=PROMPT).click()
    playground.settled()
    base, mixture = playground.asked()
    assert "profile" not in base
    assert _profile(mixture) == {"expert": 0.6, "concise": 0.6, "unfriendly": 0.6}
    assert base["messages"] == mixture["messages"] == [{"role": "user", "content": PROMPT}]
    assert base["seed"] == mixture["seed"]
    assert base["stream"] is mixture["stream"] is True
    assert playground.answer(0)
    assert playground.answer(1)
    assert re.search(r"\d+ tokens? .* first after \d+\.\d\d s", playground.page.locator(".figures").nth(1).inner_text())


def test_sliders_become_weights(playground: Playground) -> None:
    playground.open()
    playground.page.locator("#preset").select_option("base")
    for name, position in {"expertise": "0.35", "style": "-0.8", "formal": "-0.25"}.items():
        playground.slider(name).fill(position)
    playground.ask()
    assert _profile(playground.asked()[-1]) == {"expert": 0.35, "friendly": 0.8, "formal": -0.25}
    assert playground.slider("style").get_attribute("aria-valuetext") == "friendly 0.80"
    assert playground.slider("informativeness").get_attribute("aria-valuetext") == "0, neither concise nor informative"


def test_all_sliders_at_zero_are_the_base(playground: Playground) -> None:
    playground.open()
    playground.slider("expertise").dblclick(position={"x": 20, "y": 18})  # a click would move it there
    playground.page.get_by_role("button", name="Reset informativeness to 0").click()
    playground.page.get_by_role("button", name="Reset style to 0").click()
    playground.ask()
    assert all("profile" not in body for body in playground.asked())
    assert playground.page.locator("#preset").input_value() == "base"


def test_an_answer_arrives_in_steps(playground: Playground) -> None:
    playground.open()
    playground.page.evaluate(
        """() => {
            const answer = document.querySelectorAll('article .answer > p')[1];
            window.lengths = [];
            new MutationObserver(() => window.lengths.push(answer.textContent.length))
                .observe(answer, { childList: true, characterData: true, subtree: true });
        }"""
    )
    playground.ask()
    lengths = playground.page.evaluate("window.lengths.filter((length) => length > 0)")
    assert len(set(lengths)) > 3
    assert lengths == sorted(lengths)


def test_the_answer_is_announced_once_it_is_whole(playground: Playground, mock: Mock) -> None:
    mock.delay = 0.05
    playground.open()
    playground.page.fill("#prompt", PROMPT)
    playground.page.click("#ask")
    column = playground.page.locator("article").nth(1)
    expect(column.locator(".answer")).to_have_attribute("aria-busy", "true")
    expect(column.locator(".answer > p")).not_to_be_empty()
    assert column.locator("[role=status]").text_content() == ""
    playground.settled()
    expect(column.locator(".answer")).to_have_attribute("aria-busy", "false")
    expect(column.locator("[role=status]")).to_contain_text(playground.answer(1))


def test_a_settled_slider_asks_once_and_a_moving_one_never(playground: Playground) -> None:
    playground.open()
    playground.ask()
    before = len(playground.asked())
    slider = playground.slider("expertise")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    mouse = playground.page.mouse
    mouse.move(box["x"] + box["width"] / 2, middle)
    mouse.down()
    for step in range(1, 6):
        mouse.move(box["x"] + box["width"] * (0.5 + step / 20), middle)
        playground.page.wait_for_timeout(120)  # all together longer than the settling time
    assert len(playground.asked()) == before
    mouse.up()
    playground.settled()
    (again,) = playground.asked()[before:]  # the mixture's column only
    assert _profile(again)["expert"] == pytest.approx(0.5, abs=0.11)


def test_a_moving_slider_holds_back_what_another_has_settled(playground: Playground) -> None:
    playground.open()
    playground.ask()
    before = len(playground.asked())
    playground.page.evaluate(
        """() => {
            const [expertise, , style] = document.querySelectorAll('input[type=range]');
            style.dispatchEvent(new Event('change'));
            expertise.dispatchEvent(new Event('input'));
        }"""
    )
    playground.page.wait_for_timeout(450)
    assert len(playground.asked()) == before


def test_a_column_with_another_source_answers_anew(playground: Playground) -> None:
    playground.open()
    playground.page.locator("article select").nth(0).select_option("mixture")
    assert playground.asked() == []
    playground.ask()
    playground.page.locator("article select").nth(1).select_option("base")
    playground.page.wait_for_selector("#stop", state="hidden")
    assert ["profile" in body for body in playground.asked()] == [True, True, False]


def test_keys_that_follow_each_other_settle_together(playground: Playground) -> None:
    playground.open()
    playground.page.locator("#preset").select_option("base")
    playground.ask()
    before = len(playground.asked())
    for _ in range(4):
        playground.slider("style").press("ArrowRight")
    playground.settled()
    assert [_profile(body) for body in playground.asked()[before:]] == [{"unfriendly": 0.2}]


def test_a_new_answer_gives_up_the_one_under_way(playground: Playground, mock: Mock) -> None:
    playground.open()
    given_up: list[Any] = []
    playground.page.on("requestfailed", lambda request: given_up.append(request.post_data_json))
    playground.ask()
    mock.delay = 0.1
    playground.slider("style").fill("1")
    playground.page.wait_for_selector("article[data-state=streaming]")
    with playground.page.expect_request("**/chat/completions"):
        playground.slider("style").fill("-1")
    mock.delay = 0.01  # now the first one would be done soon as well
    playground.settled()
    assert [_profile(body)["unfriendly"] for body in given_up] == [1]
    assert playground.answer(1).startswith("elementary=0.6 concise=0.6 friendly=1:")  # not a word of the other's
    assert _profile(playground.asked()[-1])["friendly"] == 1


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop(playground: Playground, how: str) -> None:
    playground.open()
    playground.page.route("**/chat/completions", lambda route: None)
    playground.page.fill("#prompt", PROMPT)
    playground.page.press("#prompt", "Control+Enter")
    if how == "button":
        playground.page.get_by_role("button", name="Stop").click()
    else:
        playground.page.keyboard.press(how)
    playground.page.wait_for_selector("#stop", state="hidden")
    expect(playground.page.locator(".figures").nth(0)).to_have_text("stopped")


def test_presets_are_all_combinations(playground: Playground) -> None:
    playground.open()
    labels = playground.page.locator('#preset optgroup[label="Combinations"] option').all_inner_texts()
    assert len(labels) == 8
    assert len(set(labels)) == 8
    sides = {side for _, pair in DIMENSIONS.values() for side in pair}
    assert {part for label in labels for part in label.split(" + ")} == sides
    playground.page.locator("#preset").select_option(label=labels[5])
    playground.slider("formal").fill("0.1")
    assert playground.page.locator("#preset").input_value() == ""  # a mixture of one's own


def test_a_link_shares_mixture_prompt_and_sampling(playground: Playground) -> None:
    playground.open()
    playground.slider("style").fill("-0.45")
    playground.page.locator("#sampling summary").click()
    playground.page.fill("#seed", "7")
    playground.ask()
    weights = _profile(playground.asked()[-1])
    address = playground.page.url
    other = playground.context.new_page()
    playground.watch(other)
    playground.requests.clear()
    other.goto(address)
    other.wait_for_selector("#desk[aria-busy=false]")
    assert playground.asked() == []
    other.click("#ask")
    other.wait_for_selector("article[data-state=done] >> nth=1")
    body = playground.asked()[-1]
    assert (_profile(body), body["seed"], body["messages"][0]["content"]) == (weights, 7, PROMPT)


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_shown_where_there_are_scorers(playground: Playground) -> None:
    playground.open()
    playground.ask()
    rows = playground.page.locator("article").nth(1).locator(".scores li")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_be_visible()
    expect(rows.nth(0)).to_contain_text("elementary")
    expect(rows.nth(0).locator(".value")).to_contain_text(re.compile(r"^[01]\.\d\d"))


def test_an_answer_that_is_not_valid_is_called_so(playground: Playground) -> None:
    row = {"dimension": "style", "low": "friendly", "high": "unfriendly", "value": 0.0, "is_valid": False}
    playground.page.route("**/v1/scores", lambda route: route.fulfill(json={"object": "list", "data": [[row]]}))
    playground.open()
    playground.ask()
    expect(playground.page.locator(".scores .value").nth(1)).to_be_visible()
    expect(playground.page.locator(".scores .value").nth(1)).to_have_text("not a valid answer")


def test_no_scores_are_asked_for_where_there_are_no_scorers(playground: Playground, mock: Mock) -> None:
    mock.is_scored = False
    playground.open()
    playground.ask()
    assert not [request for request in playground.requests if request.url.endswith("/scores")]
    expect(playground.page.locator(".scores").nth(0)).to_be_hidden()


# ---- profiles -------------------------------------------------------------------------------------------------------


def _save(playground: Playground, user: str) -> None:
    playground.page.fill("#user", user)
    playground.page.get_by_role("button", name="Save as profile").click()


def _puts(playground: Playground) -> list[Request]:
    return [request for request in playground.requests if request.method == "PUT"]


def test_two_saved_profiles_side_by_side(playground: Playground) -> None:
    playground.open()
    for user, label in {"ada": "expert + concise + friendly", "née/ü": "elementary + informative + friendly"}.items():
        playground.page.locator("#preset").select_option(label=label)
        _save(playground, user)
        expect(playground.page.locator("#keep-note")).to_have_text(f"Saved as “{user}”.")
    sources = playground.page.locator("article select")
    sources.nth(0).select_option(label="ada")
    sources.nth(1).select_option(label="née/ü")
    playground.ask()
    assert [body["model"] for body in playground.asked()] == ["soup:ada", "soup:née/ü"]
    assert all("profile" not in body for body in playground.asked())
    assert playground.answer(0) != playground.answer(1)
    playground.slider("style").fill("0.5")
    playground.settled()
    assert len(playground.asked()) == 2  # no column shows the mixture on the desk


def test_a_saved_profile_is_a_preset(playground: Playground) -> None:
    playground.open()
    playground.slider("style").fill("-0.45")
    _save(playground, "u1042")
    expect(playground.page.locator("#preset")).to_have_value("user:u1042")
    playground.page.locator("#preset").select_option("base")
    playground.page.locator("#preset").select_option("user:u1042")
    assert playground.slider("style").input_value() == "-0.45"


def test_an_existing_profile_is_replaced_only_on_a_word(playground: Playground) -> None:
    playground.open()
    _save(playground, "u1")
    expect(playground.page.locator("#keep-note")).to_contain_text("Saved")
    assert _puts(playground)[0].headers["if-none-match"] == "*"
    playground.slider("style").fill("1")
    _save(playground, "u1")
    playground.page.get_by_role("button", name="Leave it").click()
    expect(playground.page.locator("#keep-note")).to_have_text("Left as it was.")
    assert len(_puts(playground)) == 1
    _save(playground, "u1")
    playground.page.get_by_role("button", name="Replace it").click()
    expect(playground.page.locator("#keep-note")).to_contain_text("Saved")
    assert "if-none-match" not in _puts(playground)[1].headers
    assert json.loads(_puts(playground)[1].post_data or "")["weights"]["unfriendly"] == 1


def test_a_profile_that_somebody_else_saved_meanwhile_is_not_lost(playground: Playground) -> None:
    playground.open()
    playground.page.evaluate(
        """fetch('../v1/profiles/u2', {method: 'PUT', headers: {'Content-Type': 'application/json'},
                 body: JSON.stringify({weights: {expert: 1}})})"""
    )
    _save(playground, "u2")
    expect(playground.page.locator("#conflict")).to_be_visible()
    expect(playground.page.locator("#conflict-text")).to_contain_text("u2")


def test_what_the_sliders_cannot_show_is_said(playground: Playground, mock: Mock) -> None:
    mock.profiles = {
        "opposed": {"weights": {"friendly": 0.5, "unfriendly": 0.25}, "allow_opposed": True},
        "large": {"weights": {"friendly": 1.5}},
        "negative": {"weights": {"friendly": -0.5}},
        "unknown": {"weights": {"friendly": 0.5, "gone": 0.5}},
        "divided": {"weights": {"friendly": 0.5}, "normalize": "sum"},
        "trimmed": {"weights": {"friendly": 0.5}, "method": "ties"},
    }
    playground.open()
    for user in mock.profiles:
        playground.page.locator("#preset").select_option(f"user:{user}")
        expect(playground.page.locator("#preset-note")).to_contain_text(f"“{user}”, and cannot show all")
    mock.profiles["plain"] = {"weights": {"friendly": 0.33}, "normalize": "none"}  # between two steps
    playground.page.reload()
    playground.page.locator("#preset").select_option("user:plain")
    expect(playground.page.locator("#preset-note")).to_be_empty()
    assert playground.slider("style").input_value() == "-0.33"


def test_without_a_store_it_is_said_how_to_have_one(playground: Playground, mock: Mock) -> None:
    mock.has_store = False
    playground.open()
    expect(playground.page.locator("#storeless")).to_be_visible()
    expect(playground.page.locator("#storeless")).to_contain_text("--profiles profiles.db")
    expect(playground.page.locator("#save")).to_be_hidden()


# ---- copies ---------------------------------------------------------------------------------------------------------

AWKWARD = 'Say "it\'s $HOME", `ls`; \\ now\nand émile 🫖'


def test_the_copied_profile_is_a_profile(playground: Playground) -> None:
    playground.open()
    playground.page.fill("#user", "no")  # YAML 1.1 would read a bool
    playground.slider("style").fill("-0.45")
    text = _copied(playground, "YAML profile")
    profile = Profile(**YAML(typ="safe").load(text))
    assert profile.user == "no"
    assert YAML(typ="safe").load(f"%YAML 1.1\n---\n{text}")["user"] == "no"
    assert profile.weights == {"elementary": 0.6, "concise": 0.6, "friendly": 0.45}


def test_the_copied_command_says_the_same(playground: Playground) -> None:
    playground.open()
    playground.ask(AWKWARD)
    words = shlex.split(_copied(playground, "command line"))
    body = playground.asked()[-1]
    options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert words[:2] == ["psoups", "generate"]
    assert words[-1] == body["messages"][0]["content"] == AWKWARD
    assert Profile.parse_weights(options["--weights"]) == _profile(body)
    assert options["--base"] == "tiny"
    assert (int(options["--seed"]), float(options["--temperature"])) == (body["seed"], body["temperature"])
    assert int(options["--max-new-tokens"]) == body["max_tokens"]


def test_the_copied_curl_sends_what_the_page_sends(playground: Playground) -> None:
    playground.open()
    playground.ask(AWKWARD)
    words = shlex.split(_copied(playground, "curl").replace("\\\n", ""))
    assert words[:3] == ["curl", "-N", f"{playground.url}/v1/chat/completions"]
    assert words[3:6] == ["-H", "Content-Type: application/json", "-d"]
    assert json.loads(words[6]) == playground.asked()[-1]


def test_a_prompt_like_an_option_is_none(playground: Playground) -> None:
    playground.open()
    playground.page.fill("#prompt", "--help")
    assert shlex.split(_copied(playground, "command line"))[-2:] == ["--", "--help"]


def test_without_a_clipboard_the_text_can_be_selected(playground: Playground) -> None:
    playground.page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    playground.open()
    playground.page.get_by_role("button", name="Copy as YAML profile").click()
    selected = playground.page.evaluate("document.activeElement.value")
    assert YAML(typ="safe").load(selected)["weights"]["concise"] == 0.6


# ---- key, faults ----------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_used_and_kept_nowhere(playground: Playground) -> None:
    page = playground.page
    _ask_for_a_key(page)
    page.goto(f"{playground.url}/playground/")
    page.get_by_label("This server asks for an API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The server does not know this key.")
    page.get_by_label("This server asks for an API key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#desk[aria-busy=false]")
    expect(page.locator("#key")).to_be_hidden()
    page.click("#theme")  # the one thing that is stored
    playground.ask()
    assert playground.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    texts = [_copied(playground, name) for name in ("curl", "command line", "YAML profile", "link")]
    assert '-H "Authorization: Bearer $PSOUPS_API_KEY"' in texts[0]
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    seen = [*texts, kept, page.content(), *(request.url for request in playground.requests)]
    seen += [request.post_data or "" for request in playground.requests]
    seen += [str(cookie) for cookie in playground.context.cookies()]
    assert not [text for text in seen if KEY in text]
    assert page.locator("#key-input").input_value() == ""
    assert json.loads(kept)[0] == {"psoups-theme": "light"}


def test_a_key_that_is_revoked_is_asked_for_anew(playground: Playground) -> None:
    playground.open()
    _ask_for_a_key(playground.page)
    playground.ask()
    expect(playground.page.locator("#key")).to_be_visible()
    playground.page.locator("#key-input").fill(KEY)
    playground.page.keyboard.press("Enter")
    expect(playground.page.locator("#key")).to_be_hidden()
    playground.page.locator("#prompt").press("Control+Enter")
    playground.settled()
    assert playground.answer(0)


def test_a_busy_server_is_tried_again_by_hand(playground: Playground) -> None:
    playground.open()
    body = {"error": {"message": "too many requests"}}
    playground.page.route(
        "**/chat/completions", lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, json=body)
    )
    playground.ask()
    expect(playground.page.locator(".fault").nth(0)).to_be_visible()
    expect(playground.page.locator(".fault").nth(0)).to_contain_text("try again in 7 seconds")
    playground.page.unroute("**/chat/completions")
    playground.page.locator(".fault button").nth(0).click()
    playground.settled()
    assert playground.answer(0)
    expect(playground.page.locator(".fault").nth(0)).to_be_hidden()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('data: {"choices":[{"index":0,"delta":{"content":"Wash"}}]}\n\n', "ended before the answer was whole"),
        ('data: {"error":{"message":"out of memory; GPU 0; ask for less"}}\n\n', "out of memory; GPU 0; ask for less"),
    ],
)
def test_an_answer_that_breaks_off_is_called_so(playground: Playground, body: str, text: str) -> None:
    playground.open()
    playground.page.route(
        "**/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    playground.ask()
    expect(playground.page.locator(".fault").nth(1)).to_be_visible()
    expect(playground.page.locator(".fault").nth(1)).to_contain_text(text)
    assert playground.answer(1) == ("Wash" if "Wash" in body else "")


def test_a_server_that_is_gone(playground: Playground) -> None:
    playground.page.route("**/v1/**", lambda route: route.abort())
    playground.page.goto(f"{playground.url}/playground/")
    expect(playground.page.locator("#trouble")).to_be_visible()
    expect(playground.page.locator("#trouble")).to_contain_text("cannot be reached")
    playground.page.unroute("**/v1/**")
    playground.page.get_by_role("button", name="Try again").click()
    playground.page.wait_for_selector("#desk[aria-busy=false]")
    expect(playground.page.locator("#trouble")).to_be_hidden()


# ---- safety ---------------------------------------------------------------------------------------------------------


def test_names_and_answers_stay_text(playground: Playground, mock: Mock) -> None:
    mock.text = f"{NASTY} <script>document.title='taken'</script>"
    mock.extra = [NASTY]
    mock.profiles[NASTY] = {"weights": {"expert": 0.6}}
    playground.open()
    playground.slider("<img").fill("0.5")
    playground.page.locator("article select").nth(0).select_option(label=NASTY)
    playground.ask(NASTY)
    assert NASTY in playground.answer(1)
    assert NASTY in playground.page.locator("#desk").inner_text()
    assert playground.page.locator("#asked").inner_text() == NASTY
    assert playground.page.locator("img").count() == 1  # the page's own
    assert "Playground" in playground.page.title()
    assert playground.complaints == []


def test_no_other_host_and_no_complaint(playground: Playground) -> None:
    playground.open()
    playground.ask()
    playground.page.click("#theme")
    _save(playground, "u3")
    playground.page.wait_for_timeout(200)
    assert {request.url.split("/")[2] for request in playground.requests} == {playground.url.split("/")[2]}
    assert playground.complaints == []
    response = playground.page.request.get(f"{playground.url}/playground/")
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_the_files_are_small_and_hold_nothing_inline() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}


# ---- reach ----------------------------------------------------------------------------------------------------------


def _focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))


def test_by_keyboard_alone(playground: Playground) -> None:
    playground.open()
    page = playground.page
    walk = [_focused(page)]
    while not walk[-1].startswith("style:") and len(walk) < 30:
        page.keyboard.press("Tab")
        walk.append(_focused(page))
        if walk[-1] == "prompt":
            page.keyboard.type(PROMPT)
    order = ["theme", "prompt", "ask", "preset"]
    assert [name for name in walk if name in order] == order
    page.keyboard.press("End")
    assert playground.slider("style").get_attribute("aria-valuetext") == "unfriendly 1.00"
    page.keyboard.press("Control+Enter")
    playground.settled()
    assert _profile(playground.asked()[1])["unfriendly"] == 1
    assert playground.answer(1)
    page.keyboard.press("Tab")  # the slider's reset
    page.keyboard.press("Enter")
    assert _focused(page).startswith("style:")
    playground.settled()
    assert "unfriendly" not in _profile(playground.asked()[-1])


def test_every_control_has_a_name_and_focus_can_be_seen(playground: Playground, mock: Mock) -> None:
    mock.profiles["ada"] = {"weights": {"expert": 0.6}}
    playground.open()
    playground.page.locator("#sampling summary").click()
    playground.ask()
    roles = ["button", "textbox", "combobox", "slider", "spinbutton", "link", "img", "article", "group", "list"]
    for role in roles:
        for control in playground.page.get_by_role(role).all():  # type: ignore[arg-type]
            snapshot = control.aria_snapshot().split("\n")[0]
            assert re.search(rf'{role} "', snapshot) or role in {"group", "list"}, snapshot
    unnamed = playground.page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea')].filter((control) =>
            !(control.ariaLabel || control.textContent.trim() && control.tagName === 'BUTTON'
              || [...control.labels ?? []].some((label) => label.textContent.trim()))).map((each) => each.outerHTML)"""
    )
    assert unnamed == []
    playground.page.keyboard.press("Shift+Tab")
    assert playground.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


# Every visible text against what lies behind it, by WCAG 2's relative luminance.
_CONTRASTS = """() => {
  const parse = (color) => {
    const numbers = color.match(/[\\d.]+/g).map(Number);
    return { rgb: numbers.slice(0, 3), alpha: numbers[3] ?? 1 };
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const { rgb, alpha } = parse(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return rgb;
    }
    throw new Error('nothing opaque');
  };
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const isWritten = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!isWritten && !('placeholder' in element) || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest('.hidden, option')) continue;
    const style = getComputedStyle(element);
    const name = `${element.tagName} ${element.className} ${element.id}`;
    found.push([name, ratio(parse(style.color).rgb, behind(element))]);
    if (!element.placeholder) continue;
    found.push([name, ratio(parse(getComputedStyle(element, '::placeholder').color).rgb, behind(element))]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(playground: Playground, scheme: Any) -> None:
    playground.page.emulate_media(color_scheme=scheme)
    playground.open()
    playground.page.locator("#preset").select_option(label="elementary + informative + unfriendly")
    _save(playground, "")  # complains, in red
    playground.page.route("**/chat/completions", _fail_the_base)
    playground.ask()
    expect(playground.page.locator(".scores").nth(1)).to_be_visible()
    playground.page.mouse.move(0, 0)
    contrasts = playground.page.evaluate(_CONTRASTS)
    assert len(contrasts) > 40
    assert [pair for pair in contrasts if pair[1] < 4.5] == []


def _fail_the_base(route: Route) -> None:
    if "profile" in (route.request.post_data or ""):
        route.continue_()
    else:
        route.fulfill(status=500, json={"error": {"message": "it failed"}})


def test_light_and_dark_by_choice(playground: Playground) -> None:
    playground.page.emulate_media(color_scheme="dark")
    playground.open()
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = playground.page.evaluate(ground)
    playground.page.get_by_role("button", name="Theme: auto").click()
    light = playground.page.evaluate(ground)
    assert light != dark
    playground.page.reload()
    assert playground.page.evaluate(ground) == light
    playground.page.get_by_role("button", name="Theme: light").click()
    assert playground.page.evaluate(ground) == dark
    expect(playground.page.get_by_role("button", name="Theme: dark")).to_be_visible()


def _lengthen(route: Route) -> None:
    text = route.fetch().text().replace("unfriendly", "as_unfriendly_as_can_be_without_a_reason")
    route.fulfill(content_type="application/json", body=text.replace('"style"', '"the_style_of_it_all_as_it_is_heard"'))


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1280])
def test_nothing_overflows(playground: Playground, mock: Mock, width: int) -> None:
    mock.text = f"a{'b' * 200} " * 2
    mock.extra = ["a_very_long_name_of_an_expert_that_somebody_trained"]
    playground.page.set_viewport_size({"width": width, "height": 700})
    playground.page.route("**/v1/experts", _lengthen)
    playground.open()
    playground.slider("a_very").fill("0.5")
    playground.page.locator("#sampling summary").click()
    playground.ask("c" * 150)
    expect(playground.page.locator(".scores").nth(1)).to_be_visible()
    assert playground.page.evaluate("document.documentElement.scrollWidth") <= width
    cut = playground.page.evaluate(
        """[...document.querySelectorAll('main *')]
            .filter((each) => each.checkVisibility() && !each.closest('.hidden'))
            .filter((each) => each.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
            .map((each) => each.outerHTML)"""
    )
    assert cut == []


def test_targets_are_large_enough_for_a_finger(playground: Playground) -> None:
    context = playground.context.browser
    assert context is not None
    phone = context.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = phone.new_page()
    page.goto(f"{playground.url}/playground/")
    page.wait_for_selector("#desk[aria-busy=false]")
    heights = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, summary')]
            .filter((each) => each.checkVisibility({ visibilityProperty: true }))
            .map((each) => [each.outerHTML, each.getBoundingClientRect().height])"""
    )
    phone.close()
    assert len(heights) > 15
    assert [pair for pair in heights if pair[1] < (24 if "reset" in pair[0] else 44)] == []


def test_the_first_paint_is_there_within_a_second(playground: Playground) -> None:
    firsts = []
    for _ in range(3):  # the best of three: other work on the machine is not the page's
        playground.open()
        paints = playground.page.evaluate("performance.getEntriesByType('paint').map((each) => each.startTime)")
        firsts.append(min(paints))
        playground.page.goto("about:blank")
    assert min(firsts) < 1000


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_a_long_name_breaks_nothing(playground: Playground, mock: Mock, width: int) -> None:
    name = "somebody-" * 22
    mock.profiles[name] = {"weights": {"friendly": 0.5}}
    playground.page.set_viewport_size({"width": width, "height": 900})
    playground.open()
    playground.page.locator("article select").nth(0).select_option(f"user:{name}")
    playground.page.locator("#preset").select_option(f"user:{name}")
    assert playground.page.evaluate("document.documentElement.scrollWidth") <= width
