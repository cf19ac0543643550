"""The chat page in a real browser: it is typed into, watched while it streams, and looked at."""

import json
import re

import pytest
from browser import Browser
from real_model import NAME
from standin import ANSWER, KEY, StandIn

from jaxformers.serve.page import content_security_policy, page

ANSWERED = "document.querySelector('.said.assistant:last-child .figures')"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844, "phone": True}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def server():
    server = StandIn()
    yield server
    server.close()


@pytest.fixture
def chat(browser, server):
    """The page, opened anew in an empty tab."""
    open_chat(browser, server)
    return browser


def open_chat(browser, server, **screen):
    browser.problems.clear()
    browser.open(server.url, **(screen or DESKTOP))
    browser.see("sessionStorage.clear()")
    browser.open(server.url, **(screen or DESKTOP))
    browser.wait("document.querySelector('#model').value || document.activeElement.id === 'key'")


def ask(browser, text, *, wait=ANSWERED):
    browser.click("#draft")
    browser.type(text)
    browser.press("Enter")
    browser.wait(wait)


def widths_fit(browser):
    return browser.see("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_message_is_typed_and_its_answer_streams_in(screen, browser, server, tmp_path):
    open_chat(browser, server, **screen)
    ask(browser, "Please think about attention", wait="document.querySelector('.rich').innerText.length > 20")
    early = browser.text(".rich")
    assert browser.see("document.querySelector('#go').ariaLabel") == "Stop"
    browser.wait(ANSWERED)
    assert len(early) < len(browser.text(".rich"))
    assert "every token look at every other" in browser.text(".rich strong")
    assert browser.see("document.querySelector('.thought div').textContent") == "The user wants me to think."
    assert "150 tokens" in browser.text(".said.assistant .figures")
    assert browser.see("document.querySelector('#go').ariaLabel") == "Send"
    assert browser.see("document.querySelector('#draft').value") == ""
    assert widths_fit(browser)
    assert browser.screenshot(tmp_path / "page.png").startswith(b"\x89PNG")
    assert browser.problems == []


@pytest.mark.xdist_group("real server")
@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_real_model_answers_on_the_page(screen, browser, real, tmp_path):
    open_chat(browser, real, **screen)
    assert browser.see("document.querySelector('#model').value") == NAME
    ask(browser, "hello")
    assert browser.text(".rich") != ""
    assert re.search(r"\b\d+ tokens", browser.text(".said.assistant .figures"))
    assert browser.see("document.querySelector('#go').ariaLabel") == "Send"
    assert widths_fit(browser)
    assert browser.screenshot(tmp_path / "page.png").startswith(b"\x89PNG")
    assert browser.problems == []
    assert real.idle()


def test_what_a_model_writes_is_shown_and_never_run(chat):
    ask(chat, "hello")
    assert chat.see("document.title") == "jaxformers chat"
    assert chat.see("document.querySelectorAll('.rich img, .rich script').length") == 0
    assert chat.see("[...document.querySelectorAll('.rich a')].map((a) => a.href)") == [
        "https://arxiv.org/abs/1706.03762"
    ]
    code = chat.see("document.querySelector('.code code').textContent")
    assert code == re.search(r"```python\n(.*?)\n```", ANSWER, re.DOTALL)[1]
    assert chat.see("[...document.querySelectorAll('.rich ol > li')].length") == 2
    assert chat.see("[...document.querySelectorAll('.rich td')].map((cell) => cell.innerText)")[:2] == [
        "query",
        "[T, N]",
    ]


HOSTILE = [
    "<script>document.title='broken'</script>",
    "`<b>` **<i>x</i>** [a](data:text/html,<script>) [b](JaVaScRiPt:x) <a href=javascript:x>",
    "```\nnever closed <img src=x onerror=x>",
    "``` `` ` *** ___ ~~~ [[[]]]((())) ||| > > > 1. - * # ",
    "- a\n  - b\n     - c\n- d\n\n\n> > deep\n> 1. x\n",
    "|a|\n|-|\n|<b>|\n|x",
    "**" * 3000,
    "[" * 3000,
    "> " * 200 + "x",
    "\u202e\u0000\ufffd 😀",
]


def test_any_text_is_rendered_as_text(chat):
    for text in HOSTILE:
        chat.see(f"renderInto(document.querySelector('#talk'), {json.dumps(text)})")
        assert chat.see("document.querySelectorAll('#talk img, #talk script, #talk i, #talk a').length") == 0, text
    assert chat.see("document.title") == "jaxformers chat"
    assert chat.problems == []


def test_a_text_rendered_as_it_grows_looks_as_it_does_at_once(chat):
    text = json.dumps(ANSWER)
    grown = f"""(() => {{ const a = document.createElement('div'), b = document.createElement('div'), text = {text};
        for (let end = 1; end <= text.length; end++) renderInto(a, text.slice(0, end));
        renderInto(b, text);
        return a.innerHTML === b.innerHTML && a.children.length > 5; }})()"""
    assert chat.see(grown)


def test_an_answer_is_stopped_and_the_server_knows(chat, server):
    ask(chat, "forever", wait="document.querySelector('.rich').innerText.length > 50")
    chat.click("#go")
    chat.wait("document.querySelector('.figures')?.textContent === 'stopped'")
    kept = chat.text(".rich")
    assert server.disconnected.wait(10)
    assert kept == chat.text(".rich")
    ask(chat, "and on", wait="document.querySelectorAll('.said').length === 4")
    assert [m["role"] for m in server.bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_shift_enter_begins_a_line_and_enter_sends_both(chat, server):
    chat.click("#draft")
    chat.type("one")
    chat.press("Enter", shift=True)
    chat.type("two")
    chat.press("Enter")
    chat.wait(ANSWERED)
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "one\ntwo"}]


def test_settings_are_sent_and_only_those_that_are_set(chat, server):
    ask(chat, "plain")
    assert set(server.bodies[-1]) == {"model", "stream", "stream_options", "messages"}
    chat.click("#settings")
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "64",
        "seed": "7",
    }.items():
        chat.see(f"document.getElementById('{name}').focus()")
        chat.type(value)
    chat.click("#new")
    ask(chat, "again")
    body = server.bodies[-1]
    assert {k: body[k] for k in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 7,
    }
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "again"}]
    assert body["model"] == "SmolLM2-135M-Instruct"


def test_a_question_is_edited_and_an_answer_regenerated(chat, server):
    ask(chat, "first")
    chat.click("[aria-label=Regenerate]")
    chat.wait(ANSWERED + " && document.querySelectorAll('.said').length === 2")
    assert len(server.bodies) == 2
    assert server.bodies[0] == server.bodies[1]
    chat.see("document.querySelector('main').scrollTop = 0")
    chat.click("[aria-label=Edit]")
    chat.type(" of all")
    chat.press("Enter")
    chat.wait("document.querySelector('.user .body')?.textContent === 'first of all'")
    chat.wait(ANSWERED)
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "first of all"}]


def test_copying_says_so(chat):
    ask(chat, "hello")
    chat.see(
        "document.execCommand = () => { window.copied = document.activeElement.value ?? getSelection().toString(); }"
    )
    chat.see("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    chat.click(".said.assistant [aria-label=Copy]")
    chat.wait("window.copied")
    assert chat.see("window.copied") == ANSWER
    chat.wait("document.querySelector('.said.assistant .deeds').innerText.includes('Copied')")


@pytest.mark.parametrize(
    "words, title, detail",
    [
        ("busy", "The server is busy", "256 requests are waiting. Try again in 3 s."),
        ("break", "The server broke off", "the engine has failed"),
    ],
)
def test_what_goes_wrong_is_said_and_can_be_tried_again(words, title, detail, chat, server):
    ask(chat, words, wait="document.querySelector('.fault')")
    assert chat.text(".fault b") == title
    assert detail in chat.text(".fault")
    chat.click(".fault button")
    chat.wait("document.querySelector('.fault')")
    assert len(server.bodies) == 2
    ask(chat, "hello")
    assert server.bodies[-1]["messages"][-1] == {"role": "user", "content": "hello"}


def test_a_server_with_a_key_asks_for_it_and_the_tab_keeps_it(browser):
    server = StandIn(locked=True)
    open_chat(browser, server)
    assert "API key" in browser.text("#model")
    browser.type(KEY)
    browser.press("Tab")
    browser.wait("document.querySelector('#model').value === 'SmolLM2-135M-Instruct'")
    assert browser.see("[sessionStorage['jaxformers.key'], localStorage.length]") == [KEY, 0]
    browser.open(server.url, **DESKTOP)
    browser.wait("document.querySelector('#model').value === 'SmolLM2-135M-Instruct'")
    server.close()


def test_every_control_has_a_name_and_phones_have_room_for_a_finger(browser, server):
    open_chat(browser, server, **PHONE)
    browser.click("#settings")
    nameless = """[...document.querySelectorAll('button, input, select, textarea')].filter((node) => !(node.ariaLabel
        || node.innerText.trim() || node.title || node.labels?.length)).map((node) => node.outerHTML)"""
    assert browser.see(nameless) == []
    assert widths_fit(browser)
    browser.press("Escape")
    small = """[...document.querySelectorAll('header button, header select, .go')].map((node) =>
        node.getBoundingClientRect().height).filter((height) => height < 40)"""
    assert browser.see(small) == []


def test_the_page_asks_nothing_of_anyone_else():
    html = page()
    assert set(re.findall(r"https?://[\w./]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img|iframe)[^>]*\bsrc=|@import|url\(|<link[^>]*stylesheet|\son\w+=\"", html)
    assert "innerHTML" not in html
    policy = content_security_policy()
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
