"""Take the documentation's pictures of the explorer. Look at each of them.

    python -m experiments.explore --run_dir=runs/demo --serve
    python tests/explorer_pictures.py --live=http://127.0.0.1:8000/ --latent=229
    python tests/explorer_pictures.py --graphs=runs/transcoders --graph=SLUG

The first shows a live page; --latent is shown, and pushed after `return`. The second shows a graph of a run, from the
page on disk. Writes docs/_static/explorer_NAME.png.
"""

import argparse
import collections
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from chromium import LAUNCH, PHONE, PROGRAM
from playwright.sync_api import Browser, Page, sync_playwright

from bridge.circuits.graph_check import FEATURE, TOKEN

OUT = Path(__file__).resolve().parents[1] / "docs" / "_static"
DESK = {"width": 1440, "height": 900}
TEXT = "def mean(values):\n    return sum(values) / len(values)\n"
PROMPT = "def is_open(self):\n    return"
FEATURES, TOKENS = 8, 2
"""Pinned nodes of a graph beside its first logit."""


class Camera:
    """Takes pictures of pages into a folder."""

    def __init__(self, browser: Browser, out: Path):
        self._browser, self._out = browser, out

    def open(self, address: str, wait: str, **settings: Any) -> Page:
        """Return a page that shows what it is to show."""
        tab = self._browser.new_page(**({"viewport": DESK} | settings))
        tab.goto(address)
        tab.wait_for_selector(wait, timeout=60_000)
        return tab

    def take(self, name: str, tab: Page) -> None:
        """Write the picture of a page, and close it."""
        tab.wait_for_timeout(1500)
        tab.screenshot(path=self._out / f"explorer_{name}.png")
        tab.close()


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", help="address of a live page")
    parser.add_argument("--latent", type=int, default=0)
    parser.add_argument("--strength", type=float, default=60.0, help="to which the latent is set")
    parser.add_argument("--graphs", type=Path, help="a run with graphs")
    parser.add_argument("--graph", help="name of one of them")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=LAUNCH)
        camera = Camera(browser, args.out)
        if args.live:
            take_latents(camera, args.live, args.latent, args.strength)
        if args.graphs:
            take_graph(camera, args.graphs / "explorer", args.graph)
        browser.close()


def take_latents(camera: Camera, live: str, number: int, strength: float) -> None:
    """Take the pictures of latents, steering and lenses."""
    latent = f"{live}#latent={number}"
    camera.take("list", camera.open(live, ".overview"))
    tab = camera.open(latent, ".latent .example")
    hook = tab.request.get(f"{live}api/info").json()["saes"][0]["hook"]
    camera.take("latent", tab)
    push = {"push": f"{hook},{number},clamp,{strength},all", "prompt": PROMPT, "max_tokens": 40}
    tab = camera.open(f"{live}#view=steer&{urlencode(push)}", ".push", color_scheme="dark")
    tab.click("#go")
    tab.wait_for_selector("#stop[disabled]", timeout=120_000)
    camera.take("steer", tab)
    lens = urlencode({"view": "lens", "lens": "direct", "text": TEXT})
    camera.take("lens", camera.open(f"{live}#{lens}", ".lenstable", viewport={"width": 1400, "height": 620}))
    camera.take("phone", camera.open(latent, ".latent .example", viewport=PHONE))


def take_graph(camera: Camera, folder: Path, slug: str) -> None:
    """Take the pictures of a graph: a feature and its links, pinned nodes, and both on a phone."""
    script = (folder / "graphs" / f"{slug}.graph.js").read_text(encoding="utf-8")
    nodes = json.loads(script.partition(",")[2].removesuffix(");\n"))["nodes"]
    features, tokens = ([node for node in nodes if node["feature_type"] == kind] for kind in (FEATURE, TOKEN))
    for some in (features, tokens):
        some.sort(key=lambda node: node["influence"])
    target = next(node["node_id"] for node in nodes if node["is_target_logit"])
    (label, _), *_ = collections.Counter(node["clerp"] for node in features[:FEATURES]).most_common()
    group = [node["node_id"] for node in features[:FEATURES] if node["clerp"] == label]
    pinned = [target, *(node["node_id"] for node in features[:FEATURES] + tokens[:TOKENS])]
    page = (folder / "index.html").as_uri()
    clicked = {"view": "graph", "graph": slug, "clickedId": features[0]["node_id"]}
    pins = {"pinnedIds": ",".join(pinned), "supernodes": json.dumps([[label, *group]])}
    camera.take("graph", camera.open(f"{page}#{urlencode(clicked)}", ".side .card"))
    tab = camera.open(f"{page}#{urlencode(clicked | pins)}", ".pins .card")
    tab.evaluate("document.querySelector('.pins').scrollIntoView({ block: 'end' })")
    camera.take("graph_pinned", tab)
    camera.take("graph_phone", camera.open(f"{page}#{urlencode(clicked)}", ".side .card", viewport=PHONE))


if __name__ == "__main__":
    main()
