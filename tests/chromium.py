"""The system's Chromium, driven by Playwright, and helpers for tests of the explorer's page."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LAUNCH = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 844}

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start one Chromium for a module; without one, skip the test, or fail under JSAE_REQUIRE_BROWSER=1."""
    missing = [] if PROGRAM else ["no chromium is installed (Debian: apt-get install chromium)"]
    if importlib.util.find_spec("playwright") is None:
        missing.append("no playwright is installed (pip install playwright)")
    if missing:
        reason = "; ".join(missing)
        if os.environ.get("JSAE_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PROGRAM, args=LAUNCH)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser) -> Iterator[Visit]:
    """Return a function that opens pages; they must not write to the console, send outside requests or open dialogs."""
    problems: list[str] = []
    contexts = []

    def opened(url: str, expected: str = "", wait: str = ".row", **settings: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | settings))
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(15_000)
        home = url.partition("#")[0].rpartition("/")[0]

        def on_console(message: Any) -> None:
            if not (expected and expected in message.text):
                problems.append(f"console: {message.text}")

        def on_request(request: Any) -> None:
            if not request.url.startswith((home, "data:", "blob:")):
                problems.append(f"requested {request.url}")

        tab.on("console", on_console)
        tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
        tab.on("request", on_request)
        tab.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.goto(url)
        tab.wait_for_selector(f"{wait}, [role=alert]", state="attached")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def shown(tab: Any) -> list[int]:
    """Return the latents of the list, in its order."""
    return [int(row.get_attribute("data-latent")) for row in tab.query_selector_all(".row")]


def wait_for(tab: Any, latents: list[int]) -> None:
    """Wait until the list shows exactly these latents."""
    tab.wait_for_function(
        "wanted => JSON.stringify([...document.querySelectorAll('.row')].map(r => +r.dataset.latent)) == wanted",
        arg=json.dumps(latents, separators=(",", ":")),
    )


def open_latent(tab: Any, latent: int) -> None:
    tab.wait_for_selector(f".latent[data-latent='{latent}']")


def push(tab: Any, latent: int, other: int) -> None:
    """Push the latent that is open on a live page, and another that is found by its number."""
    open_latent(tab, latent)
    tab.click("#push")
    tab.wait_for_selector(f".push[data-latent='{latent}']")
    tab.fill("#find", f"#{other}")
    tab.click(".found button >> nth=0")


def wait_for_address(tab: Any, *parts: str) -> None:
    """Wait until the address of a page holds some parts."""
    tab.wait_for_function("parts => parts.every(part => location.hash.includes(part))", arg=list(parts))


def assert_fits(tab: Any, *places: str) -> None:
    """Assert that these elements need no horizontal scrolling on a phone."""
    for selector in ("html", *places):
        needed, visible = tab.evaluate(
            "s => [document.querySelector(s).scrollWidth, document.querySelector(s).clientWidth]", selector
        )
        assert needed <= visible <= PHONE["width"], selector


ENOUGH = 4.5
"""The minimum contrast of text: WCAG 2.2, 1.4.3."""

_CONTRASTS = """() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const parts = color => numbers(color).map((v, i) => color.startsWith("color(") && i < 3 ? 255 * v : v);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const channel = v => v <= 10.3 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b) + 0.05;
  const ground = node => node
    ? over(parts(getComputedStyle(node).backgroundColor), ground(node.parentElement)) : [255, 255, 255];
  const told = (node, text, part) => {
    const under = ground(node);
    const [a, b] = [light(over(parts(getComputedStyle(node, part).color), under)), light(under)];
    return [Math.max(a, b) / Math.min(a, b), node.className, text];
  };
  const own = node => [...node.childNodes].filter(one => one.nodeType === 3).map(one => one.data).join("").trim();
  const seen = [...document.querySelectorAll("body *")].filter(
    node => node.getClientRects().length && !node.closest("select, svg, :disabled"));
  return [...seen.filter(own).map(node => told(node, own(node))),
    ...seen.filter(node => node.placeholder && !node.value).map(node => told(node, node.placeholder, "::placeholder"))];
}"""


def contrasts(tab: Any) -> list[tuple[float, str, str]]:
    """Return contrast, class and text of every visible text against its background."""
    return tab.evaluate(_CONTRASTS)
