""" "Find my taste" in a real browser: by keyboard and by thumb, stopped, taken back, repeated, deleted, gone wrong."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.serving.playground.conftest import Playground
from tests.serving.playground.mock import Mock
from tests.serving.playground.test_playground import CONTRASTS

pytestmark = pytest.mark.browser


def _start(page: Page, user: str = "") -> None:
    page.get_by_role("button", name="Find my taste").click()
    page.locator("#taste-user").fill(user)
    page.get_by_role("button", name="Start").click()


def _shows(page: Page, title: str) -> None:
    expect(page.get_by_role("dialog").get_by_role("heading", level=2)).to_have_text(title)


def _number(page: Page, number: int, most: int = 10) -> None:
    _shows(page, f"Question {number} of {most}")
    expect(page.locator("#taste-prompt")).to_have_text(f"Prompt {number}?")


def _position(playground: Playground, name: str) -> str:
    return str(playground.slider(name).input_value())


# ---- ways through ---------------------------------------------------------------------------------------------------


def test_by_keyboard_from_the_button_to_the_sliders(playground: Playground, mock: Mock) -> None:
    playground.open()
    page = playground.page
    page.locator("#find-taste").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("ada")
    page.keyboard.press("Enter")
    for number, key in enumerate(["1", "ArrowLeft", "2", "ArrowRight", "0", "=", "s", "1", "2"], 1):
        _number(page, number)
        page.keyboard.press(key)
    _number(page, 10)
    page.keyboard.press("Backspace")
    _number(page, 9)
    page.keyboard.press("0")
    _number(page, 10)
    page.keyboard.press("1")
    _shows(page, "What you prefer")
    assert mock.chosen["ada"] == [
        "first", "first", "second", "second", "tie", "tie", "skip", "first", "tie", "first",
    ]  # fmt: skip
    expect(page.locator("#taste-sentence")).to_contain_text("You prefer friendly answers.")
    expect(page.locator("#taste-sentence")).to_contain_text("still open")
    expect(page.locator("#taste-mixture")).to_have_text("Mixture: friendly 0.60 · expert 0.35")
    expect(page.locator("#taste-guess")).to_have_text("We would guess 9 of 10 of your choices.")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Use these
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert (_position(playground, "style"), _position(playground, "expertise")) == ("-0.6", "0.35")
    assert _position(playground, "informativeness") == "0"
    assert mock.profiles["ada"]["weights"] == {"friendly": 0.6, "expert": 0.35}
    expect(page.locator("#preset")).to_have_value("user:ada")
    expect(page.locator("#preset-note")).to_have_text("The sliders show what you prefer, saved as “ada”.")
    assert page.evaluate("document.activeElement.id") == "find-taste"
    assert playground.complaints == []


def test_by_thumb(playground: Playground, phone: Page, mock: Mock) -> None:
    playground.watch(phone)
    mock.text = "A sentence of an answer that is read on a phone. " * 12
    phone.goto(f"{playground.url}/playground/")
    phone.wait_for_selector("#sliders[aria-busy=false]")
    phone.locator("#find-taste").tap()
    assert phone.evaluate("document.activeElement.id") == "taste-title"  # a field would bring up a keyboard
    phone.get_by_role("button", name="Start").tap()
    for number in range(1, 11):
        _number(phone, number)
        _check_reach(phone)
        if number == 1:
            texts = phone.locator("#taste-texts")
            assert texts.evaluate("each => each.scrollHeight > each.clientHeight")
            texts.evaluate("each => { each.scrollTop = each.scrollHeight; }")
        else:
            assert phone.locator("#taste-texts").evaluate("each => each.scrollTop") == 0
        phone.get_by_role("button", name=["First", "Second", "About equal", "Skip"][number % 4]).tap()
    _shows(phone, "What you prefer")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    (guest,) = mock.chosen
    assert re.fullmatch(r"guest-\d+-\d+-\d+", guest)
    phone.get_by_role("button", name="Use these").tap()
    expect(phone.get_by_role("dialog")).to_have_count(0)
    assert phone.locator('input[aria-label^="style"]').input_value() == "-0.6"
    assert mock.profiles == {}  # nobody gave a name to save it by
    assert playground.complaints == []


def _check_reach(phone: Page) -> None:
    """See that all buttons are on the lower half of the screen, and large enough for a finger."""
    boxes = phone.evaluate(
        "[...document.querySelectorAll('.choices button')].map((each) => each.getBoundingClientRect())"
    )
    assert len(boxes) == 6
    for box in boxes:
        assert box["height"] >= 44
        assert box["width"] >= 44
        assert box["top"] >= 422
        assert box["bottom"] <= 844
        assert box["left"] >= 0
        assert box["right"] <= 390
    first, second = phone.evaluate(
        "[...document.querySelectorAll('.pair .text')].map((each) => each.getBoundingClientRect())"
    )
    assert first["bottom"] <= second["top"]


def test_answers_stand_side_by_side_on_a_large_screen(playground: Playground) -> None:
    playground.open()
    _start(playground.page)
    _number(playground.page, 1)
    first, second = (playground.page.locator(".pair .text").nth(at).bounding_box() for at in (0, 1))
    assert first is not None
    assert second is not None
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] < second["x"]
    dialog = playground.page.get_by_role("dialog").bounding_box()
    assert dialog is not None
    assert dialog["x"] >= 0
    assert dialog["y"] + dialog["height"] <= 800


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_long_words_and_answers_overflow_nothing(playground: Playground, mock: Mock, width: int) -> None:
    mock.text = f"a{'b' * 300} " * 8
    page = playground.page
    page.set_viewport_size({"width": width, "height": 640})
    playground.open()
    _start(page, "somebody-" * 20)
    _number(page, 1)
    buttons = page.locator(".choices button")
    for at in range(6):
        box = buttons.nth(at).bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 640
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    _shows(page, "What you prefer")
    assert page.get_by_role("dialog").evaluate("each => each.scrollWidth <= each.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_stop_shows_what_is_known_and_can_go_on(playground: Playground, mock: Mock) -> None:
    playground.open()
    page = playground.page
    _start(page, "bo")
    _number(page, 1)
    page.get_by_role("button", name="Second").click()
    _number(page, 2)
    page.keyboard.press("Escape")
    _shows(page, "What you prefer")
    page.get_by_role("button", name="Go on").click()
    _number(page, 2)
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    _start(page, "bo")  # another time
    _number(page, 2)
    assert mock.chosen == {"bo": ["second"]}


def test_stop_waits_for_the_answer_under_way_and_a_second_time_does_not(playground: Playground, mock: Mock) -> None:
    playground.open()
    page = playground.page
    _start(page, "hal")
    _number(page, 1)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/questions?*", hold)
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_attribute("aria-busy", "true")
    held[0].continue_()
    _shows(page, "What you prefer")
    expect(page.get_by_role("dialog")).to_have_attribute("aria-busy", "false")
    page.get_by_role("button", name="Go on").click()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert mock.chosen == {"hal": ["first"]}


def test_escape_before_the_first_answer_closes(playground: Playground, mock: Mock) -> None:
    playground.open()
    _start(playground.page)
    _number(playground.page, 1)
    playground.page.keyboard.press("Escape")
    expect(playground.page.get_by_role("dialog")).to_have_count(0)
    assert mock.chosen == {}


def test_five_more_are_asked(playground: Playground, mock: Mock) -> None:
    mock.num_questions = 2
    playground.open()
    page = playground.page
    _start(page, "cy")
    for number in (1, 2):
        _number(page, number, 2)
        page.keyboard.press("1")
    page.get_by_role("button", name="Ask 5 more").click()
    for number in range(3, 8):
        _number(page, number, 7)
        page.keyboard.press("1")
    _shows(page, "What you prefer")
    expect(page.locator("#taste-notes li")).to_have_text(["You chose the first answer all 6 times."])


def test_answers_are_deleted_only_on_a_word(playground: Playground, mock: Mock) -> None:
    mock.num_questions = 2
    playground.open()
    page = playground.page
    _start(page, "née/ü")
    for number in (1, 2):
        _number(page, number, 2)
        page.keyboard.press("2")
    page.get_by_role("button", name="Delete my answers").click()
    expect(page.get_by_role("dialog")).to_contain_text("Delete your 2 answers?")
    page.get_by_role("button", name="Keep them").click()
    assert page.evaluate("document.activeElement.id") == "taste-delete"
    assert mock.chosen == {"née/ü": ["second", "second"]}
    page.get_by_role("button", name="Delete my answers").click()
    page.get_by_role("button", name="Delete them").click()
    _shows(page, "Find my taste")
    expect(page.locator("#taste-told")).to_have_text("Your answers are deleted.")
    assert mock.chosen == {}


def test_answers_without_a_name_are_deleted_when_the_page_is_left(playground: Playground, mock: Mock) -> None:
    playground.open()
    page = playground.page
    _start(page)
    _number(page, 1)
    page.keyboard.press("1")
    _number(page, 2)
    assert len(mock.chosen) == 1
    page.goto("about:blank")
    while mock.chosen:  # the suite's timeout ends a test in which they are never deleted
        page.wait_for_timeout(10)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_lost_request_is_sent_again_and_counts_once(playground: Playground, mock: Mock) -> None:
    playground.open()
    page = playground.page
    _start(page, "di")
    _number(page, 1)
    page.route("**/questions?*", lambda route: route.abort())
    page.keyboard.press("1")
    fault = page.locator("#taste-fault")
    expect(fault).to_contain_text("cannot be reached")
    page.unroute("**/questions?*")
    fault.get_by_role("button", name="Try again").click()
    _number(page, 2)
    expect(fault).to_be_hidden()
    assert mock.chosen == {"di": ["first"]}


def test_a_key_that_is_held_and_a_double_click_answer_once(playground: Playground, mock: Mock) -> None:
    playground.open()
    page = playground.page
    _start(page, "ed")
    _number(page, 1)
    page.keyboard.down("1")
    _number(page, 2)
    page.keyboard.down("1")  # a key that is held repeats
    page.keyboard.down("1")
    page.keyboard.up("1")
    page.get_by_role("button", name="Second").dblclick()
    _number(page, 3)
    page.keyboard.press("s")
    _number(page, 4)
    assert mock.chosen == {"ed": ["first", "second", "skip"]}


def test_keys_of_the_browser_and_of_the_page_answer_nothing(playground: Playground, mock: Mock) -> None:
    playground.open()
    page = playground.page
    page.fill("#prompt", "x")
    _start(page, "s1")  # letters of a name are no choices
    _number(page, 1)
    page.keyboard.press("Control+s")
    page.keyboard.press("Alt+2")
    page.keyboard.press("Control+Enter")
    page.keyboard.press("2")
    _number(page, 2)
    assert mock.chosen == {"s1": ["second"]}
    assert playground.asked() == []


def test_two_windows_of_one_user_are_told(playground: Playground, mock: Mock) -> None:
    playground.open()
    page = playground.page
    _start(page, "fay")
    _number(page, 1)
    mock.chosen["fay"] = ["tie", "tie"]  # another window
    page.keyboard.press("1")
    expect(page.locator("#taste-fault")).to_contain_text("in another window")
    page.get_by_role("button", name="Go on from there").click()
    _number(page, 3)
    assert mock.chosen["fay"] == ["tie", "tie"]


@pytest.mark.parametrize(
    ("code", "buttons"),
    [("experts_changed", []), ("other_questions", ["Delete my answers"]), ("too_many_answers", ["Try again"])],
)
def test_a_refusal_is_shown_with_what_can_be_done(playground: Playground, code: str, buttons: list[str]) -> None:
    def refuse(route: Route) -> None:
        route.fulfill(status=409, json={"error": {"message": "the reason and the fix", "code": code}})

    playground.open()
    page = playground.page
    page.route("**/questions?*", refuse)
    _start(page, "gus")
    fault = page.locator("#taste-fault")
    expect(fault.get_by_role("alert")).to_have_text("the reason and the fix")
    assert [each.inner_text() for each in fault.get_by_role("button").all()] == buttons


def test_a_revoked_key_is_asked_for(playground: Playground) -> None:
    playground.open()
    page = playground.page
    page.route("**/questions?*", lambda route: route.fulfill(status=401, json={"error": {"message": "no"}}))
    _start(page)
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator("#key")).to_be_visible()


def test_nothing_known_cannot_be_used(playground: Playground, mock: Mock) -> None:
    mock.num_questions = 1
    playground.open()
    _start(playground.page)
    _number(playground.page, 1, 1)
    playground.page.keyboard.press("s")
    _shows(playground.page, "Nothing is known yet")
    expect(playground.page.get_by_role("button", name="Use these")).to_have_count(0)


@pytest.mark.parametrize("user", [".", ".."])
def test_names_that_an_address_cannot_hold_are_refused(playground: Playground, user: str) -> None:
    playground.open()
    _start(playground.page, user)
    expect(playground.page.locator("#taste-fault")).to_contain_text("choose another")
    assert not [request for request in playground.requests if "questions" in request.url]


def test_with_a_key_of_one_user_the_page_is_this_users(playground: Playground, mock: Mock) -> None:
    mock.bound_user, mock.num_questions = "ada", 1
    mock.profiles["ada"] = {"weights": {"expert": 0.45}}
    playground.open()
    page = playground.page
    expect(page.locator("#saved")).to_be_hidden()  # it would list others
    expect(page.locator("#user")).to_have_value("ada")
    assert page.locator("#user").get_attribute("readonly") is not None
    assert page.locator('#preset optgroup[label="Saved profiles"] option').all_inner_texts() == ["ada"]
    page.get_by_role("button", name="Find my taste").click()
    expect(page.locator("#taste-user")).to_have_value("ada")
    assert page.locator("#taste-user").get_attribute("readonly") is not None
    page.get_by_role("button", name="Start").click()
    _number(page, 1, 1)
    page.keyboard.press("1")
    page.get_by_role("button", name="Use these").click()
    expect(page.locator("#preset-note")).to_contain_text("saved as “ada”")
    assert mock.chosen == {"ada": ["first"]}
    assert playground.complaints == []


def test_without_questions_there_is_no_button(playground: Playground, mock: Mock) -> None:
    mock.has_questions = False
    playground.open()
    expect(playground.page.locator("#find-taste")).to_be_hidden()


def test_texts_stay_text(playground: Playground, mock: Mock) -> None:
    mock.text = "<img src=x onerror=\"document.title='taken'\">"
    playground.open()
    _start(playground.page, "<b>hal</b>")
    expect(playground.page.locator("#taste-first")).to_have_text(f"First 1. {mock.text}")
    assert playground.page.locator("#taste img").count() == 0
    assert "taken" not in playground.page.title()


# ---- reach ----------------------------------------------------------------------------------------------------------


def test_a_screen_reader_is_told_each_question_and_kept_in_the_dialog(playground: Playground) -> None:
    playground.open()
    page = playground.page
    _start(page)
    _number(page, 1)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_have_accessible_name("Question 1 of 10")
    told = page.locator("#taste-told")
    expect(told).to_contain_text("Prompt 1? First answer: First 1.")
    assert page.evaluate("document.activeElement.id") == "taste-title"
    names = []
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.textContent.trim().split(' ')[0]"))
        assert page.evaluate("!!document.activeElement.closest('dialog') || document.activeElement === document.body")
        if names[-1] in {"First", "Second"}:
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    # Back is disabled before the first answer
    assert [name for name in names if name in {"First", "Second", "Back", "About", "Skip", "Stop"}][:5] == [
        "First", "Second", "About", "Skip", "Stop",
    ]  # fmt: skip
    page.get_by_role("button", name="Skip").click()
    expect(told).to_contain_text("Prompt 2?")
    assert page.evaluate("document.activeElement.id") == "taste-title"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(playground: Playground, mock: Mock, scheme: Any) -> None:
    mock.num_questions = 7
    page = playground.page
    page.emulate_media(color_scheme=scheme)
    playground.open()
    _start(page, "..")  # complains, in red
    contrasts = page.evaluate(CONTRASTS)
    page.locator("#taste-user").fill("")
    page.get_by_role("button", name="Start").click()
    for number in range(1, 8):
        _number(page, number, 7)
        if number == 1:
            contrasts += page.evaluate(CONTRASTS)  # Back is disabled
        page.keyboard.press("1")
    page.get_by_role("button", name="Delete my answers").click()
    expect(page.locator("#taste-notes li")).to_be_visible()
    page.mouse.move(0, 0)
    contrasts += page.evaluate(CONTRASTS)
    names = {name for name, _ in contrasts}
    assert {"P  taste-sentence", "P  taste-ask", "P wrong taste-fault-text", "BUTTON  taste-back"} <= names
    assert [pair for pair in contrasts if pair[1] < 4.5] == []


def test_nothing_moves_where_no_motion_is_wanted(playground: Playground) -> None:
    playground.open()  # the fixture asks for reduced motion
    _start(playground.page)
    _number(playground.page, 1)
    moving = playground.page.evaluate(
        """[...document.querySelectorAll('dialog, dialog *')].filter((each) => {
            const style = getComputedStyle(each);
            return style.animationName !== 'none' || Number.parseFloat(style.transitionDuration) > 0;
        }).map((each) => each.outerHTML)"""
    )
    assert moving == []


def test_the_server_decides_how_many_questions_are_asked(playground: Playground, mock: Mock) -> None:
    playground.open()
    _start(playground.page, "ivy")
    _number(playground.page, 1)
    playground.page.keyboard.press("1")
    _number(playground.page, 2)
    sent = [request for request in playground.requests if "/questions" in request.url]
    assert all("num_questions" not in request.url for request in sent)
    body: dict[str, Any] = json.loads(sent[-1].post_data or "")
    assert body == {"question": "q1", "choice": "first"}
