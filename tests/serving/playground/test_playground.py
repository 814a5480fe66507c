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
    aborted: list[Any] = []
    playground.page.on("requestfailed", lambda request: aborted.append(request.post_data_json))
    playground.ask()
    mock.delay = 0.1
    playground.slider("style").fill("1")
    playground.page.wait_for_selector("article[data-state=streaming]")
    with playground.page.expect_request("**/chat/completions"):
        playground.slider("style").fill("-1")
    mock.delay = 0.01  # now the first one would be done soon as well
    playground.settled()
    assert [_profile(body)["unfriendly"] for body in aborted] == [1]
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
    other.wait_for_selector("#sliders[aria-busy=false]")
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
    assert len(playground.asked()) == 2  # no column shows the sliders' mixture


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


# ---- the list of saved profiles -------------------------------------------------------------------------------------


def _row(playground: Playground, user: str) -> Any:
    return playground.page.locator(f'#found li[data-user="{user}"]')


def _opened_row(playground: Playground, user: str) -> Any:
    row = _row(playground, user)
    row.locator("summary").click()
    expect(row.locator(".versions > li").nth(0)).to_be_visible()
    return row


def _users(playground: Playground) -> list[str]:
    users: list[str] = playground.page.eval_on_selector_all("#found > li", "rows => rows.map(row => row.dataset.user)")
    return users


def test_profiles_behind_the_first_ones_are_found_and_used(playground: Playground, mock: Mock) -> None:
    names = [f"u{number:03}" for number in range(305)]
    mock.profiles = {name: {"weights": {"friendly": 0.5}} for name in names}
    mock.profiles["u304"] = {"weights": {"expert": 0.25}}
    playground.open()
    expect(playground.page.locator("#preset-note")).to_contain_text("search below for the others")
    assert _users(playground) == names[:10]
    playground.page.locator("#more").click()
    expect(_row(playground, "u010").locator("summary")).to_be_focused()
    assert _users(playground) == names[:20]
    playground.page.fill("#find", "U30")
    expect(playground.page.locator("#found > li")).to_have_count(5)
    expect(playground.page.locator("#found-note")).to_have_text("5 profiles")
    expect(playground.page.locator("#more")).to_be_hidden()
    assert playground.page.locator('#preset option[value="user:u304"]').count() == 0
    _opened_row(playground, "u304").get_by_role("button", name="Use version 1 of u304").click()
    expect(playground.page.locator("#preset")).to_have_value("user:u304")
    assert playground.slider("expertise").input_value() == "0.25"
    playground.page.locator("article select").nth(0).select_option("user:u304")
    playground.ask()
    assert [body["model"] for body in playground.asked()] == ["soup:u304", "tiny"]
    playground.page.reload()  # the address names it
    expect(playground.page.locator("article select").nth(0)).to_have_value("user:u304")
    playground.page.fill("#find", "nobody")
    expect(playground.page.locator("#found-note")).to_have_text("No name contains “nobody”.")
    assert _users(playground) == []


def test_a_late_answer_to_an_earlier_search_is_not_shown(playground: Playground, mock: Mock) -> None:
    mock.profiles = {name: {"weights": {"friendly": 0.5}} for name in ("ada", "bea")}
    playground.open()
    late: list[Route] = []
    playground.page.route("**/v1/profiles?search=a&*", lambda route: late.append(route))  # noqa: PLW0108 # no builtin
    with playground.page.expect_request("**/v1/profiles?search=a&*"):
        playground.page.fill("#find", "a")
    playground.page.fill("#find", "be")
    expect(playground.page.locator("#found > li")).to_have_count(1)
    for route in late:
        route.continue_()
    playground.settled()
    assert _users(playground) == ["bea"]


def test_versions_are_listed_used_and_restored(playground: Playground, mock: Mock) -> None:
    mock.older["ada"] = [{"weights": {"expert": 0.3}}, {"weights": {"friendly": 0.4}, "normalize": "sum"}]
    mock.profiles["ada"] = {"weights": {"concise": 0.5}}
    playground.open()
    playground.page.locator("article select").nth(0).select_option("user:ada")
    row = _opened_row(playground, "ada")
    assert [text.split("\n")[0] for text in row.locator(".versions b").all_inner_texts()] == [
        "Version 3", "Version 2", "Version 1",
    ]  # fmt: skip
    expect(row.locator(".versions li").nth(1)).to_contain_text("friendly 0.40 · divided by their sum")
    expect(row.get_by_role("button", name="Restore version 3")).to_have_count(0)  # it is the current one
    row.get_by_role("button", name="Use version 2 of ada").click()
    expect(row.get_by_role("status")).to_contain_text("cannot show all of it")
    row.get_by_role("button", name="Use version 1 of ada").click()
    expect(row.get_by_role("status")).to_have_text("Version 1 is on the sliders.")
    assert playground.slider("expertise").input_value() == "0.3"
    assert _puts(playground) == []
    playground.ask()
    row.get_by_role("button", name="Restore version 2 of ada").click()
    expect(row.get_by_role("status")).to_have_text("Version 4 is a copy of version 2.")
    (put,) = _puts(playground)
    assert put.headers["if-match"] == '"3"'
    assert mock.profiles["ada"]["weights"] == {"friendly": 0.4}
    assert mock.profiles["ada"]["normalize"] == "sum"
    assert len(mock.versions("ada")) == 4
    playground.settled()
    assert [body["model"] for body in playground.asked()].count("soup:ada") == 2  # its column answers anew
    assert playground.complaints == []


def test_a_profile_is_deleted_only_on_a_word(playground: Playground, mock: Mock) -> None:
    mock.profiles = {name: {"weights": {"friendly": 0.5}} for name in ("ada", "bea")}
    playground.open()
    playground.page.locator("article select").nth(0).select_option("user:ada")
    row = _opened_row(playground, "ada")
    row.get_by_role("button", name="Delete ada").click()
    expect(row.get_by_role("button", name="Keep it")).to_be_focused()
    row.get_by_role("button", name="Keep it").click()
    expect(row.get_by_role("button", name="Delete ada")).to_be_focused()
    assert set(mock.profiles) == {"ada", "bea"}
    row.get_by_role("button", name="Delete ada").click()
    with playground.page.expect_request(lambda request: request.method == "DELETE") as sent:
        row.get_by_role("button", name="Delete it").click()
    assert sent.value.headers["if-match"] == '"1"'
    expect(row).to_have_count(0)
    expect(playground.page.locator("#found-note")).to_have_text("“ada” is deleted.")
    expect(playground.page.locator("#find")).to_be_focused()
    assert set(mock.profiles) == {"bea"}
    assert playground.page.locator("article select").nth(0).input_value() == "base"
    assert playground.page.locator('option[value="user:ada"]').count() == 0
    assert playground.complaints == []


@pytest.mark.parametrize("step", ["Restore version 1 of ada", "Delete ada"])
def test_what_somebody_else_wrote_meanwhile_is_neither_replaced_nor_deleted(
    playground: Playground, mock: Mock, step: str
) -> None:
    mock.older["ada"] = [{"weights": {"expert": 0.3}}]
    mock.profiles["ada"] = {"weights": {"concise": 0.5}}
    playground.open()
    row = _opened_row(playground, "ada")
    mock.older["ada"].append(mock.profiles["ada"])
    mock.profiles["ada"] = {"weights": {"friendly": 1.0}}  # version 3
    row.get_by_role("button", name=step).click()
    if step.startswith("Delete"):
        row.get_by_role("button", name="Delete it").click()
    expect(row.get_by_role("status")).to_contain_text("has changed meanwhile")
    expect(row.locator(".versions > li").nth(0)).to_contain_text("Version 3")
    assert mock.profiles["ada"] == {"weights": {"friendly": 1.0}}


def test_the_list_is_there_for_the_keyboard(playground: Playground, mock: Mock) -> None:
    mock.profiles = {name: {"weights": {"friendly": 0.5}} for name in ("ada", "bea")}
    playground.open()
    page = playground.page
    page.locator("#find").focus()
    page.keyboard.type("be")
    expect(page.locator("#found > li")).to_have_count(1)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(_row(playground, "bea").locator(".versions > li")).to_have_count(1)
    page.keyboard.press("Tab")
    assert _focused(page) == "Use version 1 of bea"
    page.keyboard.press("Enter")
    expect(page.locator("#preset")).to_have_value("user:bea")
    page.keyboard.press("Tab")
    assert _focused(page) == "Delete bea"


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
    page.wait_for_selector("#sliders[aria-busy=false]")
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
    playground.page.wait_for_selector("#sliders[aria-busy=false]")
    expect(playground.page.locator("#trouble")).to_be_hidden()


# ---- safety ---------------------------------------------------------------------------------------------------------


def test_names_and_answers_stay_text(playground: Playground, mock: Mock) -> None:
    mock.text = f"{NASTY} <script>document.title='taken'</script>"
    mock.extra = [NASTY]
    mock.profiles[NASTY] = {"weights": {"expert": 0.6}}
    playground.open()
    playground.slider("<img").fill("0.5")
    playground.page.locator("article select").nth(0).select_option(label=NASTY)
    playground.page.locator("#found summary").click()
    playground.page.locator("#found .delete").click()
    playground.ask(NASTY)
    assert NASTY in playground.page.locator("#found").inner_text()
    assert NASTY in playground.answer(1)
    assert NASTY in playground.page.locator("#sliders").inner_text()
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
    _opened_row(playground, "ada").locator(".delete").click()
    playground.ask()
    roles = [
        "searchbox",
        "button",
        "textbox",
        "combobox",
        "slider",
        "spinbutton",
        "link",
        "img",
        "article",
        "group",
        "list",
    ]
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
CONTRASTS = """() => {
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
def test_text_stands_out(playground: Playground, mock: Mock, scheme: Any) -> None:
    playground.page.emulate_media(color_scheme=scheme)
    mock.older["ada"] = [{"weights": {"expert": 0.3}}]
    mock.profiles["ada"] = {"weights": {"friendly": 0.5}}
    playground.open()
    _opened_row(playground, "ada").locator(".delete").click()
    playground.page.locator("#preset").select_option(label="elementary + informative + unfriendly")
    _save(playground, "")  # complains, in red
    playground.page.route("**/chat/completions", _fail_the_base)
    playground.ask()
    expect(playground.page.locator(".scores").nth(1)).to_be_visible()
    playground.page.mouse.move(0, 0)
    contrasts = playground.page.evaluate(CONTRASTS)
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


def _open_on(phone: Page, playground: Playground) -> None:
    phone.goto(f"{playground.url}/playground/")
    phone.wait_for_selector("#sliders[aria-busy=false]")


@pytest.mark.parametrize("how", ["an example", "the keyboard"])
def test_on_a_phone_both_answers_are_seen_above_the_sliders(playground: Playground, phone: Page, how: str) -> None:
    _open_on(phone, playground)
    if how == "an example":
        phone.get_by_role("button", name=PROMPT).tap()
    else:
        phone.fill("#prompt", PROMPT)
        phone.locator("#ask").tap()
    phone.wait_for_selector(".scores >> nth=1")
    boxes = phone.evaluate("[...document.querySelectorAll('.answer > p')].map((each) => each.getBoundingClientRect())")
    slider = phone.evaluate("document.querySelector('input[type=range]').getBoundingClientRect()")
    assert [box["height"] > 40 for box in boxes] == [True, True]
    assert 0 <= boxes[0]["top"] < boxes[0]["bottom"] < boxes[1]["top"] < boxes[1]["bottom"] <= 844
    assert boxes[1]["bottom"] < slider["top"]
    assert phone.evaluate("document.activeElement !== document.body")  # what was pressed may be gone


def test_on_a_phone_the_answers_places_are_seen_from_the_start(playground: Playground, phone: Page) -> None:
    _open_on(phone, playground)
    assert phone.evaluate("scrollY") == 0
    bottoms = phone.evaluate(
        "[...document.querySelectorAll('article')].map((each) => each.getBoundingClientRect().bottom)"
    )
    assert max(bottoms) <= 844


@pytest.mark.parametrize("width", [320, 390, 800, 1000, 1280])
def test_what_follows_in_the_page_follows_for_the_keyboard(playground: Playground, width: int) -> None:
    playground.page.set_viewport_size({"width": width, "height": 844})
    playground.open()
    places = playground.page.evaluate(
        """[...document.querySelectorAll('main > section')].map((each) => {
            const { left, top } = each.getBoundingClientRect();
            return [each.getAttribute('aria-labelledby'), Math.round(left), Math.round(top)];
        })"""
    )
    assert [name for name, *_ in places] == [
        "prompt-title", "answers-title", "sliders-title", "keep-title", "saved-title",
    ]  # fmt: skip
    for column in {left for _, left, _ in places}:
        tops = [top for _, left, top in places if left == column]
        assert tops == sorted(tops)


def test_targets_are_large_enough_for_a_finger(playground: Playground, mock: Mock, phone: Page) -> None:
    mock.older["ada"] = [{"weights": {"expert": 0.3}}]
    mock.profiles["ada"] = {"weights": {"friendly": 0.5}}
    page = phone
    _open_on(phone, playground)
    page.locator("#found summary").tap()
    page.locator("#found .delete").tap()
    heights = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, summary')]
            .filter((each) => each.checkVisibility({ visibilityProperty: true }))
            .map((each) => [each.outerHTML, each.getBoundingClientRect().height])"""
    )
    assert len(heights) > 20
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
    _opened_row(playground, name).locator(".delete").click()
    assert playground.page.evaluate("document.documentElement.scrollWidth") <= width
