"The server's page in a real browser: a keyboard, a phone, a hostile title, a wrong key, a network that fails"

import re
import socket
import threading
import time

import pytest
import uvicorn
from playwright.sync_api import expect

from recsys_lab.data.tiny import tiny, tiny_items
from recsys_lab.models.ease import EASE
from recsys_lab.serving.app import make_app
from recsys_lab.serving.doors import ServerSettings, new_key
from recsys_lab.serving.events import EventLog
from recsys_lab.serving.export import export_bundle

HOSTILE = "<img src=x onerror=alert(1)> \"Orbit\" & 'Søn'"
LONG = "Colony" + "ofants" * 20
KEY, BOBS = new_key(), new_key()
WIDE = """[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest('.pg-sr')).map(e => e.outerHTML.slice(0, 120))"""
NAMELESS = """[...document.querySelectorAll('button, input, summary, [role=listbox]')].filter(e =>
  !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length) || e.hidden)).length"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "Address and log of a server with forty films, two of them with unfriendly titles"
    top = tmp_path_factory.mktemp("server")
    films = tiny_items()
    films.loc[[0, 6], "title"] = [HOSTILE, LONG]
    bundle = export_bundle(EASE().fit(tiny(), items=films), top / "bundle")
    keys, events = f"{KEY},{BOBS}=bob", str(top / "events.db")
    app = make_app(ServerSettings(place=str(bundle), events=events, keys=keys, timeout=10))
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/", events
    running.should_exit = True
    thread.join(20)


@pytest.fixture
def visit(browser, server):
    "Open the page; returns it and everything it said, or asked of anybody else"
    opened = []

    def visit(key=KEY, width=1280, before=None, **context):
        view = {"width": width, "height": 900}
        context = browser.new_context(viewport=view, **context)
        context.set_default_timeout(10_000)
        opened.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda m: said.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: said.append(f"error: {e}"))
        page.on("dialog", lambda d: (said.append(f"dialog: {d.message}"), d.dismiss()))
        ours = (server[0], "data:")
        page.on("request", lambda r: None if r.url.startswith(ours) else said.append(r.url))
        page.on("requestfailed", lambda r: said.append(f"failed: {r.url[:200]}"))
        if before:
            before(page)
        page.goto(server[0] + (f"#key={key}" if key else ""))
        page.wait_for_selector("body[data-ready]")
        return page, said

    yield visit
    for context in opened:
        context.close()


def titles(page) -> list[str]:
    "What the list shows, best first"
    read = "[...document.querySelectorAll('.pg-title')].map(e => e.firstChild.textContent)"
    return page.evaluate(read)


def focused(page, what: str) -> str:
    return page.evaluate(f"document.activeElement.{what}")


def tab_to(page, test: str, most: int = 40):
    "Press Tab until the focused element passes a test"
    for _ in range(most):
        if page.evaluate(f"(e => {test})(document.activeElement)"):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"Tab never reaches {test}")


def add(page, text: str, *keys: str):
    "Type part of a title and take the one that is offered"
    n = page.locator("#liked li").count()
    page.locator("#q").focus()
    page.keyboard.type(text)
    page.wait_for_selector("#options:not([hidden]) [role=option]")
    for key in (*keys, "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#liked li")).to_have_count(n + 1)


def settled(page):
    "The list is there and the first three titles say why"
    expect(page.locator("#list")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".pg-why:not([hidden])")).to_have_count(3)


def test_it_tells_the_browser_what_to_refuse(visit, server):
    page, said = visit()
    answer = page.request.get(server[0])
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "sha256-" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert page.url == server[0], "the key is still in the address"
    assert not page.evaluate("localStorage.length") and not page.context.cookies()
    expect(page.locator("#source")).to_contain_text("What most people take")
    assert len(titles(page)) == 10 and said == []


def test_with_a_keyboard_alone(visit):
    page, said = visit()
    page.keyboard.press("Tab")
    assert focused(page, "className") == "rl-skip"
    tab_to(page, "e.id === 'q'")
    add(page, "signal", "ArrowDown", "ArrowUp", "ArrowDown")
    add(page, "machine", "ArrowDown", "ArrowDown")
    settled(page)
    expect(page.locator("#source")).to_contain_text("From the model")
    expect(page.locator("#changed")).to_contain_text(re.compile("Added .* The list changed"))
    before = titles(page)
    tab_to(page, "e.getAttribute('aria-label') === 'Thumbs down: ' + " + repr(before[1]))
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Space")
    expect(page.locator("#changed")).to_contain_text(f"one: {before[1]}")
    after = titles(page)
    assert before[1] not in after and before[0] in after and len(after) == 10
    assert page.inner_text("#refused span") == before[1]
    assert focused(page, "ariaLabel") == f"Thumbs down: {after[1]}"
    settled(page)
    tab_to(page, "e.tagName === 'SUMMARY'")
    page.keyboard.press("Enter")
    expect(page.locator("details[open] .pg-parts li").first).to_be_visible()
    expect(page.locator("details[open] .pg-note")).to_contain_text("Together they are the score")
    page.locator("#refused button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#changed")).to_contain_text(f"New: {before[1]}")
    assert focused(page, "id") == "q" and page.evaluate(NAMELESS) == 0
    assert said == []


def test_the_search_field_is_a_combobox(visit):
    page, said = visit()
    box, options = page.locator("#q"), page.locator("#options")
    box.press_sequentially("letters")
    expect(page.locator("#found")).to_have_text("5 titles: arrows and Enter")
    expect(box).to_have_attribute("aria-expanded", "true")
    box.press("ArrowUp")
    marked = page.evaluate(
        "document.getElementById($('q').getAttribute('aria-activedescendant'))?.ariaSelected"
    )
    assert marked == "true"
    expect(options.locator("[aria-selected=true]")).to_have_count(1)
    box.press("Escape")
    expect(options).to_be_hidden()
    assert box.input_value() == "letters"
    box.press("Escape")
    assert box.input_value() == ""
    box.press_sequentially("nothing like it")
    expect(page.locator("#found")).to_contain_text("No title has")
    assert said == []


def test_a_title_is_text(visit):
    page, said = visit()
    add(page, "<img")
    settled(page)
    assert page.inner_text("#liked span") == HOSTILE
    assert HOSTILE in page.inner_text("#changed") and HOSTILE in page.inner_text("#list")
    assert page.evaluate("document.images.length") == 0 and said == []
    made = "() => { try { $('list').insertAdjacentHTML('beforeend', '<b>') } catch (e) { return e.name } }"
    assert page.evaluate(made) == "TypeError", "markup can be made from text"


def test_a_user_says_something(visit, server):
    sent = []

    def once(route):
        "The server writes, and its answer is lost"
        sent.append(route.request.post_data_json)
        if len(sent) == 1:
            route.fetch()
            return route.abort()
        return route.continue_()

    page, _ = visit(before=lambda page: page.route("**/feedback", once))
    page.locator("[value=user]").check()
    expect(page.locator("#source")).to_have_text("Say which user.")
    page.fill("#user", "eve")
    page.keyboard.press("Enter")
    expect(page.locator("#source")).to_contain_text("nothing is known of user eve yet")
    first, second = titles(page)[:2]
    page.get_by_label(f"Thumbs up: {first}").click()
    expect(page.locator("#changed")).to_contain_text(f"one: {first}")
    expect(page.locator("#source")).to_have_text("From the model, for user eve.")
    assert len(sent) == 2 and sent[0] == sent[1] and sent[0]["user"] == "eve"
    pair = page.locator("#said [aria-pressed=true]")
    expect(pair).to_have_attribute("aria-label", f"Thumbs up: {first}")
    page.locator("#said").get_by_label(f"Thumbs down: {first}").click()
    expect(pair).to_have_attribute("aria-label", f"Thumbs down: {first}")
    expect(page.locator("#source")).to_contain_text("nothing is known of user eve yet")
    log = EventLog(server[1])
    assert [e.kind for e in log.of("eve")] == ["like", "dislike"]
    log.close()


def test_a_key_for_one_person(visit):
    page, _ = visit(BOBS)
    page.locator("[value=user]").check()
    page.fill("#user", "ann")
    page.keyboard.press("Enter")
    expect(page.locator("#wrong")).to_have_text("That did not work: this key is for another user.")


def test_a_wrong_key(visit):
    page, said = visit(None)
    expect(page.locator("#lock")).to_be_visible()
    assert page.locator("#tool").is_hidden() and focused(page, "id") == "key"
    for wrong, words in ("x" * 43, "does not know that key"), ("ключ", "letters, digits and signs"):
        page.keyboard.type(wrong)
        page.keyboard.press("Enter")
        expect(page.locator("#locked")).to_contain_text(words)
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.press("Control+A")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".pg-item")).to_have_count(10)
    assert page.locator("#lock").is_hidden() and focused(page, "id") == "q"
    assert page.evaluate("[...Object.values(sessionStorage)]") == [KEY]
    page.locator("#forget").click()
    assert page.locator("#lock").is_visible() and page.evaluate("sessionStorage.length") == 0
    assert {s for s in said if "401" not in s} == set()


def test_a_phone(visit):
    page, said = visit(width=375, reduced_motion="reduce")
    for text in "<img", LONG[:9], "wedding":
        add(page, text)
    settled(page)
    page.locator("summary").first.click()
    expect(page.locator("details[open] .pg-parts li").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), page.evaluate(WIDE)
    assert page.evaluate(WIDE) == []
    small = "[...document.querySelectorAll('.pg-thumb')].every(e => e.offsetWidth >= 44 && e.offsetHeight >= 44)"
    assert page.evaluate(small)
    lit = page.evaluate("getComputedStyle(document.querySelector('.lit')).animationName")
    assert lit == "none" and said == []


def test_what_changed_in_words(visit):
    page, said = visit()
    ids = "x => [...x].map(c => ({item_id: c, title: c.toUpperCase()}))"
    pair = f"(() => {{ const l = {ids}, c = changes(l('abcd'), l('caed')); return [c.moved, inWords(c, l('caed'))] }})()"
    moved, words = page.evaluate(pair)
    assert moved == [1, -1, None, 0], "what only fills a gap has not moved"
    assert words == "The list changed. New: E; 1 moved up; 1 moved down; gone: B."
    same = page.evaluate(
        f"(() => {{ const l = {ids}; return inWords(changes(l('ab'), l('ab')), l('ab')) }})()"
    )
    assert same == "The list stays as it was." and said == []


def test_a_bad_day(visit):
    big = 2**53 + 1
    late = {"items": [{"item_id": big, "title": "A", "score": 3.0, "rank": 1}], "source": "popular"}
    late |= {"version": "7", "degraded": "timeout"}
    page, _ = visit(before=lambda page: page.route("**/recommend", lambda r: r.fulfill(json=late)))
    expect(page.locator("#source")).to_contain_text("took too long")
    expect(page.locator("#version")).to_have_text("Answered by version 7")
    page.unroute("**/recommend")
    asked = []
    page.route("**/recommend", lambda r: (asked.append(r.request.post_data_json), r.abort()))
    page.get_by_label("Thumbs down: A").click()
    expect(page.locator("#wrong")).to_contain_text("cannot be reached")
    assert asked[0]["exclude"] == [str(big)], "a large id was rounded"
    page.unroute("**/recommend")
    add(page, "garden")
    settled(page)
    expect(page.locator("#wrong")).to_be_empty()
