"""Take the documentation's pictures of the explorer from a live page. Look at each of them.

    python -m experiments.explore --run_dir=runs/demo --serve
    python tests/explorer_pictures.py http://127.0.0.1:8000/ --latent=229

--latent is shown, and pushed after `return`. Writes docs/_static/explorer_NAME.png; those of graphs are taken by hand.
"""

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from chromium import LAUNCH, PHONE, PROGRAM
from playwright.sync_api import sync_playwright

OUT = Path(__file__).resolve().parents[1] / "docs" / "_static"
TEXT = "def mean(values):\n    return sum(values) / len(values)\n"
PROMPT = "def is_open(self):\n    return"


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("live", help="address of a live page")
    parser.add_argument("--latent", type=int, default=0)
    parser.add_argument("--strength", type=float, default=60.0, help="to which the latent is set")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=LAUNCH)
        desk = {"width": 1440, "height": 900}

        def take(name: str, address: str, wait: str, **settings: Any) -> None:
            tab = browser.new_page(**({"viewport": desk} | settings))
            tab.goto(args.live + address)
            tab.wait_for_selector(wait, timeout=60_000)
            if name == "steer":
                tab.click("#go")
                tab.wait_for_selector("#stop[disabled]", timeout=120_000)
            tab.wait_for_timeout(1500)
            tab.screenshot(path=args.out / f"explorer_{name}.png")
            tab.close()

        latent = f"#latent={args.latent}"
        hook = browser.new_page().request.get(f"{args.live}api/info").json()["saes"][0]["hook"]
        push = {"push": f"{hook},{args.latent},clamp,{args.strength},all", "prompt": PROMPT, "max_tokens": 40}
        take("list", "", ".overview")
        take("latent", latent, ".latent .example")
        take("steer", f"#view=steer&{urlencode(push)}", ".push", color_scheme="dark")
        lens = urlencode({"view": "lens", "lens": "direct", "text": TEXT})
        take("lens", f"#{lens}", ".lenstable", viewport={"width": 1400, "height": 620})
        take("phone", latent, ".latent .example", viewport=PHONE)
        browser.close()


if __name__ == "__main__":
    main()
