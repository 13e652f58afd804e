"""What the explorer keeps in its address, lists of latents, comparisons and embedded views, in a real Chromium."""

import json
from pathlib import Path
from urllib.parse import quote

import explorer_toy as toy
import numpy as np
import pytest
from chromium import ENOUGH, PHONE, assert_fits, contrasts, open_latent, wait_for, wait_for_address
from test_explorer_live import live  # noqa: F401

from bridge.explorer import page
from jsae.records.store import Store

OTHER = "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The toy run with two hooks, and its page."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    toy.write_store(run)
    toy.write_store(run, OTHER, seed=1)
    page.write(run)
    return run


@pytest.fixture(scope="module")
def address(run) -> str:
    return (run / "explorer" / "index.html").as_uri()


def test_search_order_and_filters_survive_a_reload(visit, address, run):
    tab = visit(f"{address}#hook={toy.HOOK}")
    tab.select_option("#sort", "max")
    tab.click("#turn")
    tab.click("#filters")
    tab.click("[data-state=alive]")
    wait_for_address(tab, "sort=max", "turned=yes", "only=alive")
    largest = Store(run / "explorer" / "records" / toy.HOOK)["max"]
    expected = [int(i) for i in np.argsort(largest, kind="stable") if largest[i] > 0]
    tab.reload()
    wait_for(tab, expected)
    tab.click("text=Filter")
    assert tab.get_attribute("[data-state=alive]", "aria-pressed") == "true"
    tab.evaluate(f"location.hash = '#hook={toy.HOOK}&latent=0'")  # the search goes along
    wait_for_address(tab, "latent=0", "sort=max")


def test_an_address_with_unknown_filters_is_read_as_far_as_it_is_known(visit, address):
    tab = visit(f"{address}#hook={toy.HOOK}&sort=__proto__&only=alive,constructor&density=9-2&max=x")
    wait_for(tab, [i for i in range(toy.D_SAE) if i != toy.DEAD])


def test_a_list_is_kept_shared_and_compared(visit, address):
    tab = visit(f"{address}#hook={toy.HOOK}&latent=0")
    for latent in (0, 2):
        tab.evaluate(f"location.hash = '#hook={toy.HOOK}&latent={latent}'")
        open_latent(tab, latent)
        tab.click("#shelve")
    tab.click("#tabs a[data-view=lists]")
    tab.fill("[aria-label='Remark on #2']", "<b>not bold</b>, ok")
    wait_for_address(tab, "item=")
    tab.reload()
    tab.wait_for_selector(".shelf li[data-latent='2']")
    assert tab.input_value("[aria-label='Remark on #2']") == "<b>not bold</b>, ok"
    assert [one for one in contrasts(tab) if one[0] < ENOUGH] == []
    shared = tab.evaluate("location.href")
    other = visit(shared, wait=".shelf li")  # another browser, which kept nothing
    assert other.locator(".shelf li").count() == 2
    for latent in (0, 2):
        other.check(f"[aria-label='Compare #{latent}']")
    other.click("text=Compare the ticked")
    other.wait_for_selector(".twins > section[data-latent='2']")
    assert other.locator(".twins > section").count() == 2
    assert other.locator(".twins .example").count() > 2


def test_lists_from_elsewhere_are_read_as_far_as_they_are_latents(visit, address):
    items = [f"{toy.HOOK},1,fine", f"{toy.HOOK},99,too large", "no.hook,0,", ",,", f"{toy.HOOK},1e1,", f"{OTHER},3,"]
    tab = visit(f"{address}#view=lists&name=a&" + "&".join(f"item={quote(item)}" for item in items), wait=".shelf li")
    assert [row.get_attribute("data-latent") for row in tab.query_selector_all(".shelf li")] == ["1", "3"]


@pytest.mark.parametrize("pair", ["", "a=0,0", "a=0,0&b=9,0", "a=0,0&b=0,999", "a=0,0&b=x"])
def test_a_comparison_of_nothing_says_what_to_give(visit, address, pair):
    tab = visit(f"{address}#view=compare&{pair}", wait="[role=alert]")
    assert "nothing to compare" in tab.inner_text("[role=alert]")


def test_a_view_that_does_not_exist_is_the_overview(visit, address):
    tab = visit(f"{address}#hook={toy.HOOK}&view=constructor", wait=".overview")
    assert tab.locator(".overview").is_visible()


def test_an_embedded_latent_stands_alone_and_fits_a_phone(visit, address):
    tab = visit(f"{address}#hook={toy.HOOK}&latent=0&embed=1", viewport=PHONE)
    open_latent(tab, 0)
    assert tab.locator("#list:visible, .bar:visible").count() == 0
    assert tab.locator(".example").count() > 0
    assert_fits(tab, "#main")


def test_counts_of_activations_are_drawn_on_a_logarithmic_scale_and_on_a_linear_one(visit, address, run):
    tab = visit(f"{address}#hook={toy.HOOK}&latent={toy.ORDINARY}")
    open_latent(tab, toy.ORDINARY)
    counts = Store(run / "explorer" / "records" / toy.HOOK)["hist"][toy.ORDINARY].astype(float)

    def heights() -> list[float]:
        return tab.eval_on_selector_all(
            ".side .card:first-child .chart rect.warm", "bars => bars.map(bar => +bar.getAttribute('height'))"
        )

    def expected(share: np.ndarray) -> np.ndarray:
        return np.where(counts > 0, np.maximum(1.5, 96 * share), 0)

    np.testing.assert_allclose(heights(), expected(np.log1p(counts) / np.log1p(counts.max())), atol=0.01)
    tab.click("[aria-label='Scale of the counts'] [data-value=linear]")
    np.testing.assert_allclose(heights(), expected(counts / counts.max()), atol=0.01)


def test_steering_survives_a_reload_and_a_link_starts_nothing(visit, live):  # noqa: F811
    tab = visit(f"{live[0]}#hook={toy.HOOK}&latent=3")
    open_latent(tab, 3)
    tab.click("#push")
    tab.wait_for_selector(".push[data-latent='3']")
    tab.fill("#find", "#7")
    tab.click(".found button >> nth=0")
    tab.select_option("[aria-label='Mode of #7']", "ablate")
    tab.fill("#prompt", "def f(a, b=1):\n    # 100% & more")
    tab.fill("#set-seed", "5")
    tab.press("#set-seed", "Tab")
    tab.click("[aria-label='Usual strengths of #3'] >> text=largest >> nth=0")
    strength = tab.input_value("[aria-label='Strength of #3, exactly']")
    assert "1 × its largest activation" in tab.inner_text(".push[data-latent='3']")
    wait_for_address(tab, "ablate", "seed=5", "prompt=")
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.reload()
    tab.wait_for_selector(".push[data-latent='7']")
    assert tab.input_value("#prompt") == "def f(a, b=1):\n    # 100% & more"
    assert tab.input_value("#set-seed") == "5"
    assert tab.input_value("[aria-label='Strength of #3, exactly']") == strength
    assert tab.input_value("[aria-label='Mode of #7']") == "ablate"
    assert not any("/api/steer" in url for url in requests)
    colours = tab.eval_on_selector_all(".push", "boxes => boxes.map(box => getComputedStyle(box).borderLeftColor)")
    assert len(set(colours)) == 2


def test_a_link_to_steering_that_is_hostile_pushes_only_what_exists(visit, live):  # noqa: F811
    push = [f"{toy.HOOK},3,clamp,NaN,all", f"{toy.HOOK},999,clamp,1,all", "x,0,clamp,1,all", f"{toy.HOOK},4,eval,1,all"]
    values = "&".join(f"push={quote(one)}" for one in [*push, "<img src=x>", ""])
    tab = visit(f"{live[0]}#view=steer&{values}&temperature=99&max_tokens=1e9&seed=x", wait="#prompt")
    assert tab.locator(".push").count() == 0
    settings = [tab.input_value(f"#set-{name}") for name in ("temperature", "max_tokens", "seed")]
    assert settings == ["0.5", "64", "16"]


def test_typed_text_survives_a_reload(visit, live):  # noqa: F811
    tab = visit(f"{live[0]}#hook={toy.HOOK}&view=text", wait="#typed")
    tab.fill("#typed", "x = 1 # é & ü")
    wait_for_address(tab, "text=")
    tab.reload()
    tab.wait_for_selector("#typed")
    assert tab.input_value("#typed") == "x = 1 # é & ü"
    assert json.loads(tab.evaluate("JSON.stringify(new URLSearchParams(location.hash.slice(1)).get('view'))")) == "text"
