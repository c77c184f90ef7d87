"""The page, in a browser: a picture is dropped, a question asked, the answer read; on wide windows and narrow ones."""

import base64
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.inputs.clips import make_clip
from tests.server.conftest import served

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = Path(__file__).resolve().parents[2] / "qwen3vl_moe/server/page.html"
SIZES = {"wide": (1280, 800), "narrow": (360, 720)}
DROP = """([type, data, kind]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "picture", { type: kind || "image/png" }));
  const event = type === "paste" ? new ClipboardEvent(type, { clipboardData: transfer, bubbles: true })
    : new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """``open_page(url, size)``: the page; what it complained of is an error of the test."""
    wrong, contexts = [], []

    def make(url: str, size: str = "wide"):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith((url, "data:")) else wrong.append(request.url)
        )
        page.goto(url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page, text: str) -> None:
    page.fill("#text", text)
    page.click("#send")


def ask_for_a_long_answer(page) -> None:
    """It has begun, and will not end by itself before long."""
    page.click("summary")
    page.fill("#tokens", "4000")
    page.fill("#temperature", "5")
    ask(page, "Hello")
    page.wait_for_function("() => document.querySelector('.said').textContent.length > 20")


def wait_for_answers(page, count: int) -> list[str]:
    """The texts of the answers, once there are so many and the last one is finished."""
    page.wait_for_function(
        "count => document.querySelectorAll('.said').length === count && document.querySelector('#send').textContent"
        " === 'Send' && ![...document.querySelectorAll('.figures')].at(-1).textContent.includes('…')",
        arg=count,
    )
    return page.locator(".said").all_inner_texts()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_and_a_conversation_about_it(server, open_page, question, size, way, tmp_path):
    picture, text, answer = question
    page = open_page(server.url, size)
    page.wait_for_function("() => document.querySelector('#model').textContent === 'demo'")
    page.evaluate(DROP, [way, base64.b64encode(picture).decode()])
    page.wait_for_selector("#pictures img")
    ask(page, text)
    assert wait_for_answers(page, 1) == [answer]
    figures = page.locator(".figures").inner_text()
    assert re.match(r"first token after \d+\.\d\d s · [\d.]+ tokens/s · \d+ tokens in, \d+ out", figures)
    assert page.locator(".user img").count() == 1
    assert page.locator("#pictures img").count() == 0
    ask(page, "Hello")
    assert len(wait_for_answers(page, 2)) == 2
    wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1]  # nothing has to be moved sideways
    folder = os.environ.get("PAGE_SCREENSHOTS", tmp_path)  # to look at them
    page.screenshot(path=f"{folder}/{size}-{way}.png")
    page.click("#new")
    assert page.locator(".turn").count() == 0


def test_a_video_is_dropped(server, open_page):
    clip = make_clip("webm", "libvpx", frames=10)
    page = open_page(server.url)
    page.evaluate(DROP, ["drop", base64.b64encode(clip).decode(), "video/webm"])
    page.wait_for_selector("#pictures video")
    page.click("summary")
    page.fill("#tokens", "2")
    ask(page, "What happens?")
    assert len(wait_for_answers(page, 1)) == 1
    assert "tokens in, 2 out" in page.locator(".figures").inner_text()
    assert page.locator(".user video").evaluate("video => video.readyState >= 1 && video.videoWidth") == 64


def test_answers_are_text_whatever_they_hold(server, open_page):
    bad = '<img src=x onerror="document.title=1"><script>document.title=2</script> **&amp;**'
    page = open_page(server.url)
    events = [
        {"choices": [{"index": 0, "delta": {"reasoning_content": bad}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": bad}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, bad)
    assert wait_for_answers(page, 1) == [bad]
    assert page.locator(".thought").inner_text() == bad
    assert page.locator(".user").inner_text() == bad
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "demo"


def test_an_answer_can_be_stopped(server, open_page):
    page = open_page(server.url)
    ask_for_a_long_answer(page)
    page.press("#text", "Enter")  # who types on meanwhile stops nothing
    page.wait_for_function("() => document.querySelector('.said').textContent.length > 200")
    assert page.inner_text("#send") == "Stop"
    page.click("#send")
    page.wait_for_function("() => document.querySelector('.figures').textContent.includes('stopped')")
    server.settles()


def test_a_new_chat_knows_nothing_of_the_old_one(server, open_page):
    """Not even of an answer that was being written."""
    page = open_page(server.url)
    ask_for_a_long_answer(page)
    page.fill("#tokens", "2")
    page.click("#new")
    page.wait_for_function("() => document.querySelector('#send').textContent === 'Send'")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Hi")
    assert [message["role"] for message in request.value.post_data_json["messages"]] == ["user"]
    assert len(wait_for_answers(page, 1)) == 1
    ask(page, "Hello")
    wait_for_answers(page, 2)


def test_nothing_is_dropped_in_silence(server, browser):
    """A file of another kind, a number that is none, an answer that breaks off."""
    page = browser.new_page()
    page.goto(server.url)
    page.evaluate(DROP, ["drop", "aGk=", "application/pdf"])
    assert "picture is no picture or video" in page.inner_text(".error")
    page.click("#new")
    page.click("summary")
    page.fill("#temperature", "0,7")
    ask(page, "Hello")
    page.wait_for_selector(".error")
    assert "temperature='0,7'" in page.inner_text(".error")
    page.click("#new")
    page.fill("#temperature", "")
    event = {"choices": [{"index": 0, "delta": {"content": "Half an ans"}, "finish_reason": None}]}
    body = f"data: {json.dumps(event)}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "Hello")
    page.wait_for_selector(".error")
    assert page.inner_text(".said") == "Half an ans"
    assert "broken off" in page.inner_text(".error")
    page.close()


def test_errors_and_keys(make_demo, browser):
    with served(make_demo(), api_key="secret") as closed:
        page = browser.new_page()
        page.goto(closed.url)
        page.wait_for_function("() => document.querySelector('#model').textContent.includes('key is missing')")
        page.click("summary")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_function("() => document.querySelector('#model').textContent === 'demo'")
        page.fill("#temperature", "-1")
        ask(page, "Hello")
        page.wait_for_selector(".error")
        assert "temperature=-1" in page.inner_text(".error")
        assert page.input_value("#text") == "Hello"  # to be sent again
        page.close()


def test_the_page_stands_alone(server):
    reply = server.http.get("/")
    assert "https://" not in reply.text
    assert "http://" not in reply.text
    assert "innerHTML" not in reply.text
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert reply.text == PAGE.read_text(encoding="utf-8")
