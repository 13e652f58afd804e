"""The explorer's page from disk, in a real Chromium."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import explorer_toy as toy
import numpy as np
import pytest
from chromium import ENOUGH, PHONE, assert_fits, contrasts, open_latent, shown, wait_for

from bridge.explorer import page
from bridge.run import labels
from jsae.records.store import Store

OTHER = "blocks.1.hook_mlp_out"
DEEP = f"#hook={toy.HOOK}&latent="


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The toy run with two hooks, a name that a person gave, and its page."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    toy.write_store(run)
    toy.write_store(run, OTHER, seed=1)
    labels.append(run, toy.HOOK, toy.SPLIT, "é in two halves", "seen <b>once</b>")
    page.write(run)
    return run


@pytest.fixture(scope="module")
def address(run) -> str:
    return (run / "explorer" / "index.html").as_uri()


@pytest.fixture
def home(visit, address) -> Any:
    """The toy's main hook, before a latent is chosen."""
    return visit(f"{address}#hook={toy.HOOK}")


def framed(token: bytes) -> str:
    """A token as it stands in a table: blanks as signs, bytes that are no character in hexadecimal."""
    try:
        return token.decode().translate({0: "␀", 9: "⇥", 10: "↵"}) or "∅"
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:x}" for byte in token)


# ---- the list ------------------------------------------------------------------------------------------------------


def test_the_list_shows_every_latent_with_its_label_and_numbers(home):
    assert shown(home) == list(range(toy.D_SAE))
    row = home.locator(f".row[data-latent='{toy.ORDINARY}']")
    assert "token ' cat'" in row.inner_text()
    assert "max 9.75" in row.inner_text()
    assert row.locator(".badge").inner_text() == "0.50"
    assert row.locator(".peak").inner_text() == " cat"
    assert "never fires" in home.locator(f".row[data-latent='{toy.DEAD}']").inner_text()
    assert home.locator(".count").inner_text() == "8 latents"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("ANY TOKEN", [toy.DENSE]),
        ("#5", [toy.SPLIT]),
        ("two halves", [toy.SPLIT]),
        ("seen <b>", [toy.SPLIT]),
        ("<script>alert", None),
        ("nothing like that", []),
    ],
)
def test_search_finds_labels_notes_numbers_and_tokens(home, run, query, found):
    home.fill("#search", query)
    if found is None:  # whichever latents show the token, in their snippet, their peaks or their logits
        home.wait_for_function("() => document.querySelector('.count').textContent.includes(' of ')")
        assert toy.HOSTILE in shown(home)
    else:
        wait_for(home, found)
        assert home.locator(".count").inner_text() == f"{len(found)} of 8"


@pytest.mark.parametrize("key", ["density", "max", "mean"])
def test_the_list_is_sorted_by_what_one_chooses_and_back(home, run, key):
    store = Store(run / "explorer" / "records" / toy.HOOK)
    column = store[{"density": "count"}.get(key, key)]
    home.select_option("#sort", key)
    wait_for(home, np.argsort(-column.astype(float), kind="stable").tolist())
    home.click("#turn")
    wait_for(home, np.argsort(column, kind="stable").tolist())


def test_sorting_by_label_puts_those_without_one_last(home):
    home.select_option("#sort", "label")
    wait_for(home, [2, 0, 7, 3, 5, 1, 4, 6])
    home.select_option("#sort", "f1")
    wait_for(home, [0, 2, 3, 7, 1, 4, 5, 6])


def test_filters_leave_the_dead_the_dense_the_labelled_and_what_people_named(home):
    home.click("#filters")
    densities = toy.columns(toy.tokens(), toy.activations(toy.tokens()))["count"] / 439
    dense = np.flatnonzero(densities > 0.1).tolist()
    for state, wanted in {
        "dead": [toy.DEAD],
        "dense": dense,
        "alive": [i for i in range(8) if i != toy.DEAD],
        "labelled": [0, 2, 3, 5, 7],
        "named": [toy.SPLIT],
    }.items():
        home.click(f"[data-state={state}]")
        wait_for(home, wanted)
        home.click(f"[data-state={state}]")
    home.click("[data-state=dense]")
    home.click("[data-state=labelled]")
    wait_for(home, [i for i in dense if i in (0, 2, 3, 5, 7)])
    home.click("#clear")
    wait_for(home, list(range(8)))


def test_filters_know_the_range_of_densities_and_the_tokens_that_are_raised(home, run):
    store = Store(run / "explorer" / "records" / toy.HOOK)
    home.click("#filters")
    home.fill("#logit", "once")
    token = toy.ID[" once"]
    wait_for(home, [i for i in range(8) if token in store["top_logits"][i]])
    home.fill("#logit", "")
    home.locator("#density-low").fill("0.75")  # 10^(-0.25 * 6) = 3.2 %
    density = store["count"] / store.header.tokens
    wait_for(home, np.flatnonzero(density > 10**-1.5).tolist())
    home.locator("#density-high").fill("0.9")  # 10^(-0.1 * 6) = 25 %
    wait_for(home, np.flatnonzero((density > 10**-1.5) & (density < 10**-0.6)).tolist())


def test_filters_know_the_range_of_largest_activations(home, run):
    largest = Store(run / "explorer" / "records" / toy.HOOK)["max"]
    home.click("#filters")
    home.locator("#max-low").fill("0.5")
    low, high = largest[largest > 0].min(), largest.max()
    wait_for(home, np.flatnonzero(largest > np.sqrt(low * high)).tolist())  # half way by powers of ten
    home.locator("#max-high").fill("0.25")  # handles do not pass each other
    assert home.input_value("#max-high") == "0.5"
    wait_for(home, [])
    assert "No latents match" in home.inner_text("#list")
    home.click("#clear")
    wait_for(home, list(range(8)))


# ---- a latent ------------------------------------------------------------------------------------------------------


def test_opening_a_latent_shows_all_there_is_about_it(home, run):
    home.click(f".row[data-latent='{toy.ORDINARY}']")
    open_latent(home, toy.ORDINARY)
    store = Store(run / "explorer" / "records" / toy.HOOK)
    text = home.inner_text(".latent")
    assert home.inner_text("h1") == "token ' cat'"
    assert f"1 in {round(439 / int(store['count'][0]))} tokens" in text
    assert home.locator(".chart").count() == 2
    raised = home.locator(".logits table").first.locator(".chip").all_text_contents()
    assert raised == [framed(store.texts.vocabulary[token]) for token in store["top_logits"][toy.ORDINARY]]
    assert home.locator(".picks").first.locator("li").count() == toy.NEAREST
    groups = {int(one.get_attribute("data-group")) for one in home.query_selector_all(".group")}
    assert groups == set(store["example_group"][list(store.examples(0))].tolist())
    assert home.url.endswith(f"hook={toy.HOOK}&latent=0")


def test_every_example_shows_its_text_and_where_the_latent_fires(visit, address, run):
    tab = visit(f"{address}{DEEP}{toy.ORDINARY}")
    open_latent(tab, toy.ORDINARY)
    tab.click("text=Full")
    store = Store(run / "explorer" / "records" / toy.HOOK)
    for example, row in zip(store.examples(toy.ORDINARY), tab.query_selector_all(".example"), strict=True):
        ids = store.texts.tokens[store["example_row"][example]].tolist()
        spans = row.query_selector_all(".tok")
        plain = [(span.text_content(), word) for span, word in zip(spans, store.texts.spell(ids), strict=True)]
        assert all(found == word for found, word in plain if word.isprintable() and "\ufffd" not in word), plain
        hot = [i for i, span in enumerate(spans) if "hot" in span.get_attribute("class")]
        assert hot == store.activations(example)[0].tolist()


def test_hovering_a_token_tells_its_activation_and_place(visit, address, run):
    tab = visit(f"{address}{DEEP}{toy.ORDINARY}")
    open_latent(tab, toy.ORDINARY)
    store = Store(run / "explorer" / "records" / toy.HOOK)
    first = store.examples(toy.ORDINARY)[0]
    tab.hover(".group .peak >> nth=0")
    told = tab.inner_text("#tip")
    assert "“ cat”" in told
    assert f"{store['example_value'][first]:g}" in told
    assert f"{store['example_position'][first]} of text {store['example_row'][first]}" in told
    tab.hover("h1")
    assert tab.locator("#tip").is_hidden()


def test_the_keyboard_walks_through_the_tokens_of_the_texts(visit, address):
    tab = visit(f"{address}{DEEP}{toy.ORDINARY}")
    open_latent(tab, toy.ORDINARY)
    focused = "document.activeElement.textContent"
    line = "[...document.querySelectorAll('.example')].indexOf(document.activeElement.closest('.example'))"
    tab.focus(".groups")
    tab.keyboard.press("ArrowRight")  # to the strongest token of the first text
    assert (tab.evaluate(focused), tab.evaluate(line)) == (" cat", 0)
    told = tab.inner_text("#tip")
    assert "“ cat”" in told
    assert "activation" in told
    assert tab.get_attribute(":focus", "aria-describedby") == "tip"
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#tip") != told
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text("#tip") == told
    tab.keyboard.press("ArrowDown")
    assert (tab.evaluate(focused), tab.evaluate(line)) == (" cat", 1)
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("ArrowUp")  # there is none above the first
    assert tab.evaluate(line) == 0
    for _ in range(60):
        tab.keyboard.press("ArrowLeft")  # nor one before the first that is to be seen
    assert tab.evaluate(line) == 0
    assert tab.locator(":focus").bounding_box()["x"] + 40 > tab.locator(".place").first.bounding_box()["x"]
    open_latent(tab, toy.ORDINARY)  # these arrows do not turn over to another
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").is_hidden()
    assert tab.evaluate("document.activeElement.className") == "groups"
    tab.keyboard.press("j")
    open_latent(tab, toy.ORDINARY + 1)


def test_hovering_a_histogram_tells_the_bin(visit, address):
    tab = visit(f"{address}{DEEP}{toy.DENSE}")
    open_latent(tab, toy.DENSE)
    tab.hover(".chart >> nth=0 >> .over >> nth=0")
    assert "tokens" in tab.inner_text("#tip")


@pytest.mark.parametrize(
    ("fragment", "latent", "hook"),
    [(f"#hook={toy.HOOK}&latent=3", 3, toy.HOOK), ("#latent=2", 2, OTHER), (f"#latent=7&hook={OTHER}", 7, OTHER)],
)
def test_a_deep_link_opens_its_latent(visit, address, fragment, latent, hook):
    tab = visit(address + fragment)
    open_latent(tab, latent)
    assert hook in tab.locator("#hook option:checked").inner_text()
    assert tab.locator(".row.chosen").get_attribute("data-latent") == str(latent)
    assert f"#{latent}" in tab.title()


@pytest.mark.parametrize(
    ("fragment", "said"),
    [("#latent=99", "no latent 99"), ("#latent=x", "no latent x"), ("#hook=blocks.9.attn", "no activation")],
)
def test_a_link_to_nothing_says_so(visit, address, fragment, said):
    assert said in visit(address + fragment).inner_text("[role=alert]")


def test_another_activation_is_chosen_in_the_bar(home):
    home.select_option("#hook", label=OTHER)
    home.wait_for_function(f"() => location.hash.includes('{OTHER}')")
    home.wait_for_selector(f".overview code:text-is('{OTHER}')")


def test_the_keyboard_walks_the_list_as_it_is_sorted_and_finds(home):
    home.select_option("#sort", "max")
    home.locator("#sort").blur()
    order = shown(home)
    home.keyboard.press("j")
    open_latent(home, order[0])
    home.keyboard.press("ArrowRight")
    open_latent(home, order[1])
    home.keyboard.press("j")
    open_latent(home, order[2])
    home.keyboard.press("k")
    open_latent(home, order[1])
    home.keyboard.press("/")
    home.keyboard.type("any token")
    home.keyboard.press("Enter")
    open_latent(home, toy.DENSE)
    home.keyboard.press("Escape")
    wait_for(home, order)
    home.keyboard.press("Escape")
    home.wait_for_selector(".overview")
    home.keyboard.press("?")
    assert "next latent" in home.inner_text("dialog[open]")


def test_the_skip_link_leaves_the_latent_open(visit, address):
    tab = visit(f"{address}{DEEP}{toy.DENSE}")
    open_latent(tab, toy.DENSE)
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    assert tab.url.endswith(f"latent={toy.DENSE}")


def test_neighbours_and_those_that_fire_together_lead_on(visit, address, run):
    tab = visit(f"{address}{DEEP}{toy.ORDINARY}")
    open_latent(tab, toy.ORDINARY)
    store = Store(run / "explorer" / "records" / toy.HOOK)
    tab.click(".picks a >> nth=0")
    open_latent(tab, int(store["neighbours"][toy.ORDINARY, 0]))


def test_texts_are_shown_short_or_whole_broken_into_lines_and_copied(visit, address):
    tab = visit(f"{address}{DEEP}{toy.BLANKS}", permissions=["clipboard-read", "clipboard-write"])
    open_latent(tab, toy.BLANKS)
    assert tab.locator(".example .kwic").count() == tab.locator(".example").count()
    tab.check("#breaks")
    assert tab.locator(".example .kwic").count() == 0
    assert "\n" in tab.locator(".example .text").first.text_content()
    tab.uncheck("#breaks")
    tab.keyboard.press("f")
    tab.locator(".example .text").first.wait_for()
    tab.locator(".example").first.hover()
    tab.locator(".copy").first.click()
    tab.wait_for_selector("#toast:visible")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert "<|bos|>" in copied
    assert "↵" not in copied


def test_the_dead_latent_has_a_page_without_texts(visit, address):
    tab = visit(f"{address}{DEEP}{toy.DEAD}")
    open_latent(tab, toy.DEAD)
    assert "fired on no token" in tab.inner_text(".latent")
    assert tab.locator(".chart").count() == 1  # its logits it has


# ---- hostile text --------------------------------------------------------------------------------------------------


def test_a_script_in_the_text_is_text(visit, address):
    tab = visit(f"{address}{DEEP}{toy.HOSTILE}")
    open_latent(tab, toy.HOSTILE)
    tokens = tab.locator(".group .tok", has_text="<script>alert(1)</script>")
    assert tokens.count() > 0
    assert tab.locator("main script").count() == 0
    assert tab.inner_text("h1") == "token '<script>alert(1)</script>'"
    assert "&amp;" in tab.inner_text(".groups")
    tokens.first.hover()
    assert "<script>alert(1)</script>" in tab.inner_text("#tip")


def test_no_file_of_the_page_holds_a_tag_from_the_text(run):
    for file in (run / "explorer").glob("page-*/*-*.js"):
        assert b"<" not in file.read_bytes(), file


def test_a_character_split_over_tokens_stands_with_the_token_that_completes_it(visit, address, run):
    tab = visit(f"{address}{DEEP}{toy.SPLIT}")
    open_latent(tab, toy.SPLIT)
    assert tab.locator(".example .tok", has_text=re.compile("^é$")).count() > 0
    halves = tab.locator(".example .tok.part.hot")
    assert halves.count() > 0
    halves.first.hover()
    assert "\\xc3" in tab.inner_text("#tip")
    assert "seen <b>once</b>" in tab.inner_text(".note")


def test_invisible_characters_are_made_visible(visit, address):
    tab = visit(f"{address}{DEEP}{toy.BLANKS}")
    open_latent(tab, toy.BLANKS)
    text = "".join(tab.locator(".example").all_text_contents())
    assert "\0" not in text
    assert "␀" in text
    assert tab.locator(".example .end").count() > 0
    spelled = tab.evaluate("jsae.tokens.shown('a\\u202eb\\u0007\\u200b')")
    assert spelled == "a⟨202e⟩b␇⟨200b⟩"


# ---- how it looks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragment", ["", f"{DEEP}{toy.HOSTILE}", f"{DEEP}{toy.DENSE}"])
def test_a_phone_shows_it_without_scrolling_sideways(visit, address, fragment):
    tab = visit(address + fragment, viewport=PHONE, has_touch=True, is_mobile=True)
    if fragment:
        tab.wait_for_selector(".latent")
        assert tab.locator(".list").is_hidden()
        tab.click("text=Full")
    assert_fits(tab, "main", ".rows")
    if fragment:
        tab.click(".back")
        tab.wait_for_selector(".row:visible")


def test_it_follows_the_system_into_the_dark_and_the_button_out_of_it(visit, address):
    tab = visit(address, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = tab.evaluate(ground)
    tab.click("#theme")
    light = tab.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark))) < 120 < 600 < sum(map(int, re.findall(r"\d+", light)))
    tab.reload()
    tab.wait_for_selector(".row")
    assert tab.evaluate(ground) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fragment", ["", f"{DEEP}{toy.ORDINARY}"])
def test_text_has_the_contrast_that_reading_needs(visit, address, scheme, fragment):
    tab = visit(address + fragment, color_scheme=scheme)
    tab.wait_for_selector(".latent, .overview")
    tab.click("#filters")
    told = contrasts(tab)
    assert len(told) > 50
    assert [one for one in told if one[0] < ENOUGH] == []


# ---- a list that is longer than the window ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_list(tmp_path_factory) -> str:
    """The address of a page whose list has 1,440 latents: the toy's eight, 180 times."""
    run = tmp_path_factory.mktemp("runs") / "long"
    toy.write_store(run)
    page.write(run)
    (file,) = (run / "explorer").glob("page-*/list-0.js")
    (manifest,) = (run / "explorer").glob("page-*/manifest.js")
    repeat_list(file, manifest, 180)
    return (run / "explorer" / "index.html").as_uri()


def repeat_list(file: Path, manifest: Path, times: int) -> None:
    """Write the list of a page anew with all of its latents so many times."""
    head, data, tail = re.fullmatch(r"(jsae\.put\(\"[\w-]+\",)(.*)(\);\n)", file.read_text(), re.DOTALL).groups()
    told = json.loads(data)
    for name, value in told.items():
        if name in ("by_person", "notes", "fit"):
            continue
        told[name] = (
            base64.b64encode(base64.b64decode(value) * times).decode() if isinstance(value, str) else value * times
        )
    file.write_text(f"{head}{json.dumps(told)}{tail}".replace("<", "\\u003c"))
    manifest.write_text(manifest.read_text().replace(f'"d_sae":{toy.D_SAE}', f'"d_sae":{times * toy.D_SAE}'))


FOCUSED = "+(document.activeElement.closest('.row')?.dataset.latent ?? -1)"


def test_tab_walks_from_the_filter_through_the_list_from_the_latent_that_is_open(visit, long_list):
    tab = visit(f"{long_list}#latent=229", expected="ERR_FILE_NOT_FOUND")  # there is no such shard of the toy
    tab.wait_for_selector(".row.chosen")
    tab.focus("#filters")
    walked = []
    for _ in range(30):  # more than fit into the window
        tab.keyboard.press("Tab")
        walked.append(tab.evaluate(FOCUSED))
    assert walked == list(range(229, 259))
    row = tab.locator(":focus").bounding_box()
    rows = tab.locator(".rows").bounding_box()
    assert rows["y"] - 1 <= row["y"] <= rows["y"] + rows["height"] - row["height"] + 1
    for _ in range(40):
        tab.keyboard.press("Shift+Tab")
    assert tab.evaluate(FOCUSED) == 218
    tab.wait_for_timeout(100)  # the list has been scrolled meanwhile
    tab.locator(".rows").evaluate("rows => rows.scrollTop = 0")
    tab.wait_for_timeout(100)
    assert tab.evaluate(FOCUSED) == 218  # a row that is out of sight keeps the focus
    tab.keyboard.press("Tab")
    assert tab.evaluate(FOCUSED) == 219
    assert tab.locator(".row").count() < 40


def test_the_focus_stays_on_a_latent_that_is_opened_from_the_list(home):
    home.focus(f".row[data-latent='{toy.DENSE}']")
    home.keyboard.press("Enter")
    open_latent(home, toy.DENSE)
    assert home.evaluate(FOCUSED) == toy.DENSE
    assert home.locator(":focus.chosen").count() == 1


# ---- search ----------------------------------------------------------------------------------------------------------


def test_search_puts_the_best_match_first_and_says_why_each_matched(home, run):
    store = Store(run / "explorer" / "records" / toy.HOOK)
    home.fill("#search", "cat")
    home.wait_for_selector(".row .why")
    assert shown(home)[0] == toy.ORDINARY  # its label has the word
    assert home.input_value("#sort") == "match"
    reasons = {
        latent: home.locator(f".row[data-latent='{latent}'] .why").inner_text().partition(" ")[0]
        for latent in shown(home)
    }
    assert reasons[toy.ORDINARY] == "label"
    raising = [i for i in range(8) if toy.ID[" cat"] in store["top_logits"][i][:8]]
    assert {latent for latent, why in reasons.items() if why == "raises"} <= set(raising)
    order = ["label", "fires", "raises", "text"]
    ranks = [order.index(reasons[latent]) for latent in shown(home)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 1
    home.fill("#search", "5")
    wait_for(home, [toy.SPLIT])
    assert home.inner_text(".row .why") == "number"
    home.fill("#search", "seen <b>")
    home.wait_for_selector(".why:has-text('note')")
    home.fill("#search", "")
    wait_for(home, list(range(8)))
    assert home.locator(".why").count() == 0
    assert home.input_value("#sort") == "index"


def test_a_search_may_be_sorted_otherwise(home):
    home.fill("#search", "cat")
    home.wait_for_selector(".row .why")
    home.select_option("#sort", "index")
    found = shown(home)
    assert found == sorted(found)
    home.wait_for_selector(".row .why")


# ---- fonts and small windows -----------------------------------------------------------------------------------------

WIDE_FONT = (
    "* { font-family: 'DejaVu Sans' !important; } code, .kwic, .chip { font-family: 'DejaVu Sans Mono' !important; }"
)
OVERFLOWING = """() => [...document.querySelectorAll(
    ".search, .search input, .tools .line > *, .count, .card > *, .card > h2 small, .row > *, .row .head > *")]
  .filter(node => node.getClientRects().length)
  .flatMap(node => {
    const [box, parent] = [node.getBoundingClientRect(), node.parentElement.getBoundingClientRect()];
    const style = getComputedStyle(node.parentElement);
    const out = box.right > parent.right - parseFloat(style.paddingRight) + 1
      || box.bottom > parent.bottom - parseFloat(style.paddingBottom) + 1;
    return out ? [`${node.tagName} ${node.className}: ${node.textContent.slice(0, 40)}`] : [];
  })"""
"""Elements that reach out of the room within their parent."""


@pytest.mark.parametrize("window", [{"width": 1400, "height": 900}, {"width": 1000, "height": 700}, PHONE])
@pytest.mark.parametrize("fragment", ["", f"{DEEP}{toy.ORDINARY}"])
def test_nothing_overflows_with_a_wide_font(visit, long_list, address, window, fragment):
    tab = visit(address + fragment if fragment else long_list, viewport=window, bypass_csp=True)
    tab.add_style_tag(content=WIDE_FONT)
    tab.wait_for_selector(".latent" if fragment else ".count", state="attached")
    if not fragment:
        tab.fill("#search", "o")
        tab.wait_for_selector(".why")
        assert tab.evaluate(OVERFLOWING) == []
        tab.fill("#search", "")
        tab.wait_for_selector(".count:has-text('1,440 latents')")
    assert tab.evaluate(OVERFLOWING) == []
    assert_fits(tab) if window is PHONE else None


def test_a_phone_reaches_the_overview_and_its_map(visit, address):
    tab = visit(f"{address}#hook={toy.HOOK}", viewport=PHONE, has_touch=True, is_mobile=True)
    assert tab.locator(".overview").is_hidden()
    tab.tap("#tabs a:has-text('Overview')")
    tab.wait_for_selector(".overview:visible")
    assert tab.locator("#tabs a[aria-current]").inner_text() == "Overview"
    assert tab.locator(".list").is_hidden()
    assert_fits(tab, "main")
    canvas = tab.locator(".map canvas")
    canvas.scroll_into_view_if_needed()
    assert canvas.is_visible()
    tab.tap(".picks a >> nth=0")
    tab.wait_for_selector(".latent:visible")
    tab.tap("#tabs a:has-text('Latents')")
    tab.wait_for_selector(".row:visible")


def test_a_wide_window_needs_no_links_to_what_it_shows_anyway(home):
    assert home.locator("#tabs a:visible").all_inner_texts() == ["Latents", "Lists"]
    assert home.locator(".overview").is_visible()
