"""What the explorer keeps in its address, lists of latents, comparisons and embedded views, in a real Chromium."""

import json
from pathlib import Path
from urllib.parse import quote

import explorer_toy as toy
import numpy as np
import pytest
from chromium import ENOUGH, PHONE, assert_fits, contrasts, open_latent, push, wait_for, wait_for_address
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
    assert tab.evaluate("Object.keys(localStorage).length") == 0  # a link keeps nothing by itself
    tab.click("#keeplist")
    tab.wait_for_selector("#newlist")
    tab.evaluate("location.hash = '#view=lists'")
    tab.wait_for_function("() => document.querySelectorAll('.shelf li').length === 2")
    assert tab.input_value("#listname") == "a"


def test_several_lists_are_named_noted_chosen_and_deleted(visit, address):
    tab = visit(f"{address}#hook={toy.HOOK}&latent=0")
    open_latent(tab, 0)
    tab.click("#shelve")
    tab.click("#tabs a[data-view=lists]")
    tab.click("#newlist")
    tab.fill("#listname", "Quotes & <b>")
    tab.fill("#listnote", "what hostile text is made of")
    wait_for_address(tab, "note=what")
    tab.evaluate(f"location.hash = '#hook={OTHER}&latent=3'")
    open_latent(tab, 3)
    tab.click("#shelve")
    tab.click(".choices >> text=Quotes & <b>")
    tab.click("#tabs a[data-view=lists]")
    tab.wait_for_selector(".shelf li[data-latent='3']")
    assert tab.input_value("#listnote") == "what hostile text is made of"
    assert tab.locator("#whichlist option").all_inner_texts() == ["My latents (1)", "Quotes & <b> (1)"]
    assert [one for one in contrasts(tab) if one[0] < ENOUGH] == []
    wait_for_address(tab, "item=", "note=")
    tab.reload()
    tab.wait_for_selector(".shelf li[data-latent='3']")
    assert tab.locator("#keeplist").count() == 0  # the address is that of a list which the browser has
    tab.select_option("#whichlist", "0")
    tab.wait_for_selector(".shelf li[data-latent='0']")
    tab.click("#deletelist")
    tab.click("text=Delete “My latents” for good")
    tab.wait_for_selector(".shelf li[data-latent='3']")
    assert tab.locator("#whichlist option").count() == 1


def test_lists_are_saved_to_a_file_and_read_from_it(visit, address, tmp_path):
    tab = visit(f"{address}#hook={toy.HOOK}&latent=2")
    open_latent(tab, 2)
    tab.click("#shelve")
    tab.click("#tabs a[data-view=lists]")
    tab.fill("[aria-label='Remark on #2']", "“ü”, ok")
    with tab.expect_download() as download:
        tab.click("text=Save list")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    saved = json.loads(file.read_text())
    assert (saved["name"], saved["items"][0]["latent"], saved["items"][0]["remark"]) == ("My latents", 2, "“ü”, ok")
    foreign = {"hook": "blocks.9.elsewhere", "latent": 7, "sae": "0" * 64, "remark": ""}
    file.write_text(json.dumps({"lists": [saved, saved | {"name": "Foreign", "items": [foreign]}]}))
    other = visit(f"{address}#view=lists", wait=".shelf")
    other.set_input_files("#listsfile", file)
    other.wait_for_selector(".shelf li[data-latent='7']")
    assert "of an SAE that is not on this page, blocks.9.elsewhere" in other.inner_text(".shelf")
    names = ["My latents (0)", "My latents (2) (1)", "Foreign (1)"]
    assert other.locator("#whichlist option").all_inner_texts() == names
    other.select_option("#whichlist", "1")
    other.wait_for_selector(".shelf li[data-latent='2']")
    assert other.input_value("[aria-label='Remark on #2']") == "“ü”, ok"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "this is not JSON"),
        ("[]", "holds no lists"),
        ("null", "holds no lists"),
        ('{"lists": [{"name": "a"}]}', "holds no lists"),
    ],
)
def test_a_file_that_holds_no_lists_is_refused(visit, address, tmp_path, content, message):
    (tmp_path / "lists.json").write_text(content)
    tab = visit(f"{address}#view=lists", wait=".shelf")
    tab.set_input_files("#listsfile", tmp_path / "lists.json")
    tab.wait_for_function("text => document.getElementById('toast').textContent.includes(text)", arg=message)
    assert tab.locator("#whichlist option").count() == 1


def test_a_file_of_hostile_lists_is_cut_to_what_lists_are(visit, address, tmp_path):
    items = [{"hook": toy.HOOK, "latent": n, "remark": "r" * 10_000} for n in (1, -1, 1.5, 2**40, 10**9, "1", None)]
    items += [None, 7, [], {"hook": 7, "latent": 1}, {"__proto__": 1, "latent": 1}]
    many = {"name": ["x"], "note": "n" * 10_000, "items": items}
    (tmp_path / "lists.json").write_text(json.dumps({"lists": [many, *[{"items": [], "name": "a"}] * 100]}))
    tab = visit(f"{address}#view=lists", wait=".shelf")
    tab.set_input_files("#listsfile", tmp_path / "lists.json")
    tab.wait_for_function("() => document.getElementById('toast').textContent.includes('at most 50 lists')")
    tab.reload()
    tab.select_option("#whichlist", "1")
    tab.wait_for_selector(".shelf li[data-latent='1']")
    assert [row.get_attribute("data-latent") for row in tab.query_selector_all(".shelf li")] == ["1", str(10**9)]
    assert (tab.input_value("#listname"), len(tab.input_value("#listnote"))) == ("Unnamed", 4000)
    assert len(tab.input_value("[aria-label='Remark on #1']")) == 500


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
    push(tab, 3, 7)
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
