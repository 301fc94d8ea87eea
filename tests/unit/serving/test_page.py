"""The page in a real browser, over a real Valkey; only the model is a fake."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from infra.catalogue import Catalogue
from infra.local import free_port
from infra.metrics import Meter
from infra.slate_store import AsyncSlateReader, Slate, SlateStore, UserHistory
from serving.api import create_api
from serving.auth import token_digests
from serving.flights import FreshSlates, Outcome, SlateRequest
from serving.retrieval import Retrieval
from serving.stats import Reports, Stats
from tests.fakes import ITEMS, item_id, write_bundle
from tests.tools import tool

pytestmark = pytest.mark.xdist_group("browser")  # one browser, in one of the processes
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
MARKUP = "<img src=x onerror=alert(1)> & Co."
PREFIX, VERSION, TOKEN = "page", "3f9c1e7a2b04", "a token of many characters"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def fill(url: str) -> None:
    """Slates of some users, two hours old; ann has a history."""
    now = time.time_ns() // 1_000_000 - 7_500_000
    with SlateStore(url, prefix=PREFIX) as store:
        items = [item_id(i) for i in range(ITEMS)]
        scores = [-0.31 * (i + 1) for i in range(ITEMS)]
        store.publish(VERSION, [Slate(u, tuple(items), tuple(scores), VERSION, now) for u in ("ann", "ben", "a/b c")])
        store.publish_fallback(VERSION, Slate("", tuple(items[:5]), (5.0, 4.0, 3.0, 2.0, 1.0), VERSION, now))
        store.publish_histories([UserHistory("ann", (*items[3:9], "gone"), (1, 2, 3, 4, 2, 3, 2))])
        store.complete(VERSION, users=3)
        store.activate(VERSION)


@contextmanager
def serving(url: str, folder: Path, digests: list[str]) -> Iterator[str]:
    """The HTTP face on a port of its own, in a thread; the model shows what lies behind the published items."""
    catalogue = Catalogue(write_bundle(folder))
    catalogue.items = [item._replace(title=MARKUP if place == 1 else item.title) for place, item in enumerate(catalogue.items)]
    reader, meter = AsyncSlateReader(url, prefix=PREFIX), Meter()
    retrieval = Retrieval(reader, catalogue, slate_size=ITEMS, meter=meter)

    async def compute(request: SlateRequest) -> Outcome:
        slate = Slate(request.user_id, (item_id(20), item_id(21)), (-0.1, -0.2), request.version, time.time_ns() // 1_000_000, fresh=True)
        return "stored" if await reader.put([slate]) == [True] else "dropped version"

    fresh = FreshSlates(compute, retrieval.activity, max_pending=4, deadline_s=10, meter=meter)
    api = create_api(retrieval, slate_size=ITEMS, trigger=fresh, reports=Reports(Stats(meter)), token_digests=digests)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, name="page")
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def service(valkey_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(valkey_server, tmp_path_factory.mktemp("page"), []) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = tool(*BROWSERS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])


class Watched:
    """A page, and what it complained of and whom it asked."""

    def __init__(self, page: Page) -> None:
        self.page, self.complaints, self.hosts = page, list[str](), set[str]()
        page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))


@pytest.fixture
def watched(browser: Browser, service: str, valkey: str) -> Iterator[Watched]:
    """A page that must have nothing to complain of, and ask nobody but the service."""
    fill(valkey)
    with browser.new_context(viewport=WIDE, color_scheme="light") as context:
        seen = Watched(context.new_page())
        seen.page.set_default_timeout(15_000)
        yield seen
    assert seen.complaints == []
    assert seen.hosts == {urlsplit(service).netloc}


def test_a_user_is_picked_and_slate_and_history_are_shown(watched: Watched, service: str) -> None:
    page = watched.page
    page.goto(service)
    page.get_by_role("button", name="ann", exact=True).click()
    slate, history = page.locator("#slate li"), page.locator("#history li")
    expect(slate).to_have_count(10)
    expect(slate.first).to_have_text("1Title 0item-00-0.310")
    expect(slate.nth(1)).to_contain_text(MARKUP)  # a text, and no image
    expect(history.first).to_have_text("1goneexposure")
    expect(history.nth(3)).to_have_text("4Title 6item-06purchase")
    expect(page.locator("#source")).to_have_text("stored")
    expect(page.locator("#age")).to_have_text("2 h old")
    expect(page.locator("#version")).to_have_text(VERSION)

    page.get_by_label("User", exact=True).fill("a/b c")
    page.get_by_label("Items").fill("3")
    page.get_by_role("button", name="Show slate").click()
    expect(slate).to_have_count(3)
    expect(history).to_have_text("Nothing is known of this user.")
    page.reload()  # the address names the user
    expect(page.get_by_label("User", exact=True)).to_have_value("a/b c")
    page.get_by_label("User", exact=True).fill("nobody")
    page.keyboard.press("Enter")
    expect(page.locator("#source")).to_have_text("popular")


def test_a_fresh_slate_replaces_the_old_one(watched: Watched, service: str) -> None:
    page = watched.page
    page.goto(f"{service}/#user=ben")
    expect(page.locator("#source")).to_have_text("stored")
    page.get_by_role("button", name="Compute a fresh one").click()
    expect(page.locator("#note")).to_contain_text("A fresh slate after")
    expect(page.locator("#source")).to_have_text("fresh")
    expect(page.locator("#slate li")).to_have_count(2)


def test_the_charts_follow_what_is_answered(watched: Watched, service: str, tmp_path: Path) -> None:
    page = watched.page
    page.goto(f"{service}/#user=ann")
    expect(page.locator("#state")).to_have_text("live")
    for _ in range(3):
        page.get_by_role("button", name="Show slate").click()
    expect(page.locator("#hits path")).to_have_attribute("d", re.compile("L"))
    expect(page.locator("#hits-now")).to_have_text("100 %")
    expect(page.locator("#p99")).to_contain_text("ms")
    expect(page.locator("#sources")).to_contain_text("stored")
    expect(page.locator("#replicas")).to_have_text("1")
    page.locator("#latency").hover(position={"x": page.locator("#latency").bounding_box()["width"] - 13, "y": 50})
    expect(page.locator("#latency .tip")).to_contain_text("ms · ")
    for name in ("slate", "history", "hits", "latency"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None and box["width"] > 400 and box["height"] > 100, name
    light = pixels(page, tmp_path / "light.png")
    assert light.shape == (*pixels_of(page), 3)
    assert share_of_background(light) < 0.8
    assert len(np.unique(light.reshape(-1, 3), axis=0)) > 100
    chart = np.array(Image.open(BytesIO(page.locator("#hits").screenshot())).convert("RGB")).reshape(-1, 3)
    assert len(chart[(chart == (37, 99, 235)).all(1)]) > 20, "no line in its colour"


def test_it_fits_a_telephone_and_the_dark(watched: Watched, service: str, tmp_path: Path) -> None:
    page = watched.page
    page.goto(f"{service}/#user=ann")
    expect(page.locator("#slate li").first).to_contain_text("Title 0")
    light = pixels(page, tmp_path / "light.png")
    page.emulate_media(color_scheme="dark")
    dark = pixels(page, tmp_path / "dark.png")
    assert light.mean() > 200
    assert dark.mean() < 60
    page.set_viewport_size(NARROW)
    pixels(page, tmp_path / "narrow.png")
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]


def test_the_page_asks_for_a_token_where_one_is_needed(
    browser: Browser, valkey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra.service_sections import ServingConfig

    fill(valkey)
    monkeypatch.setenv("PAGE_TOKEN", TOKEN)
    digests = token_digests(ServingConfig(tokens=["env:PAGE_TOKEN"]))
    with serving(valkey, tmp_path, digests) as url, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{url}/#user=ann")
        expect(page.locator("#source")).to_have_text("stored")
        expect(page.locator("#chips button")).to_have_count(0)
        page.get_by_role("button", name="Compute a fresh one").click()
        expect(page.locator("#note")).to_contain_text("needs a valid token")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_label("Token").blur()
        expect(page.locator("#chips button").first).to_be_visible()
        page.get_by_role("button", name="Compute a fresh one").click()
        expect(page.locator("#source")).to_have_text("fresh")


def test_no_other_page_can_hold_it_in_a_frame(browser: Browser, service: str) -> None:
    with browser.new_context() as context:
        seen = Watched(context.new_page())
        with seen.page.expect_console_message(lambda message: "frame-ancestors" in message.text):
            seen.page.set_content(f'<iframe src="{service}/"></iframe>')


def pixels(page: Page, path: Path) -> np.ndarray:
    """What is seen of the whole page."""
    page.screenshot(path=path, full_page=True)
    return np.array(Image.open(path).convert("RGB"))


def pixels_of(page: Page) -> tuple[int, int]:
    height, width = page.evaluate("[document.documentElement.scrollHeight, document.documentElement.scrollWidth]")
    return height, width


def share_of_background(image: np.ndarray) -> float:
    _, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return float(counts.max() / counts.sum())
