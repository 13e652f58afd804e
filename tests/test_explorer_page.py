"""The explorer's page as a person meets it: in a real Chromium, from the disk and from the running server."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import explorer_toy as toy
import numpy as np
import pytest
from toy_saes import export, toy_sae

import bridge.nanochat
from bridge.explorer import labels, page
from experiments import rundir
from experiments.train import RunConfig
from jsae.store import COLUMNS, VERSION, Header, Store, StoreError, Texts, TextsHeader

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LAUNCH = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OTHER = "blocks.1.hook_mlp_out"
DEEP = f"#hook={toy.HOOK}&latent="
PHONE = {"width": 390, "height": 844}
C = 128

Visit = Callable[..., Any]


# ---- what the tests stand on ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all; without one the test is skipped, or fails where JSAE_REQUIRE_BROWSER says so."""
    missing = [] if CHROMIUM else ["no chromium is installed (Debian: apt-get install chromium)"]
    if importlib.util.find_spec("playwright") is None:
        missing.append("no playwright is installed (pip install playwright)")
    if missing:
        told = "; ".join(missing)
        if os.environ.get("JSAE_REQUIRE_BROWSER") == "1":
            pytest.fail(told)
        pytest.skip(told)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=LAUNCH)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser) -> Iterator[Visit]:
    """Opens pages; none may say anything on the console, ask for anything elsewhere, or open a dialog."""
    problems: list[str] = []
    contexts = []

    def opened(url: str, expected: str = "", **settings: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | settings))
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(15_000)
        home = url.partition("#")[0].rpartition("/")[0]

        def said(message: Any) -> None:
            if not (expected and expected in message.text):
                problems.append(f"console: {message.text}")

        def asked(request: Any) -> None:
            if not request.url.startswith((home, "data:")):
                problems.append(f"asked for {request.url}")

        tab.on("console", said)
        tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
        tab.on("request", asked)
        tab.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.goto(url)
        tab.wait_for_selector(".row, [role=alert]", state="attached")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


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


def shown(tab: Any) -> list[int]:
    """The latents of the list, in its order."""
    return [int(row.get_attribute("data-latent")) for row in tab.query_selector_all(".row")]


def wait_for(tab: Any, latents: list[int]) -> None:
    """Waits until the list shows just these."""
    tab.wait_for_function(
        "wanted => JSON.stringify([...document.querySelectorAll('.row')].map(r => +r.dataset.latent)) == wanted",
        arg=json.dumps(latents, separators=(",", ":")),
    )


def framed(token: bytes) -> str:
    """A token as it stands in a table: blanks as signs, bytes that are no character in hexadecimal."""
    try:
        return token.decode().translate({0: "␀", 9: "⇥", 10: "↵"}) or "∅"
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:x}" for byte in token)


def open_latent(tab: Any, latent: int) -> None:
    tab.wait_for_selector(f".latent[data-latent='{latent}']")


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
    for file in (run / "explorer").glob("*-*.js"):
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


def test_what_one_could_not_see_is_made_visible(visit, address):
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
    for place in ("document.documentElement", "document.querySelector('main')", "document.querySelector('.rows')"):
        wide, room = tab.evaluate(f"[{place}.scrollWidth, {place}.clientWidth]")
        assert wide <= room <= PHONE["width"], place
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


CONTRASTS = """() => {
  const channel = v => v <= 10.3 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b) + 0.05;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll('.quiet, .label:not(.none), .foot span, h1, .count, dt')].map(node => {
    const words = light(getComputedStyle(node).color);
    return Math.max(words, ground) / Math.min(words, ground);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_reading_needs(visit, address, scheme):
    tab = visit(f"{address}{DEEP}0", color_scheme=scheme)
    open_latent(tab, 0)
    contrasts = tab.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert min(contrasts) >= 4.5  # WCAG 2.2, 1.4.3


# ---- its files -----------------------------------------------------------------------------------------------------


def files(run: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in (run / "explorer").iterdir() if path.suffix in (".js", ".html", ".css")
    }


def test_the_same_records_give_the_same_bytes_and_leave_nothing_of_others(tmp_path, run):
    again = tmp_path / "toy"
    toy.write_store(again)
    toy.write_store(again, OTHER, seed=1)
    labels.append(again, toy.HOOK, toy.SPLIT, "é in two halves", "seen <b>once</b>")
    for name in ("shard-0-77.js", "list-9.js", "texts-3.js"):
        (again / "explorer" / name).write_text("left from a larger run")
    page.write(again)
    assert files(again) == files(run)


def test_one_hook_of_several_can_be_shown(tmp_path):
    toy.write_store(tmp_path)
    toy.write_store(tmp_path, OTHER, seed=1)
    page.write(tmp_path, [OTHER])
    assert {name for name in files(tmp_path) if name.startswith("list-")} == {"list-0.js"}


def test_records_of_another_sae_and_a_run_without_records_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"experiments\.explore"):
        page.write(tmp_path)
    toy.write_store(tmp_path)
    weights = tmp_path / "sae" / toy.HOOK / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(StoreError, match="gather the records anew"):
        page.write(tmp_path)
    assert not (tmp_path / "explorer" / "index.html").exists()


def test_five_hundred_latents_take_less_than_ten_megabytes(tmp_path):
    write_large(tmp_path, latents=500, rows=8000, length=256)
    page.write(tmp_path)
    assert sum(map(len, files(tmp_path).values())) < 10e6
    manifest = json.loads(files(tmp_path)["manifest.js"].decode().partition(",")[2].rpartition(")")[0])
    assert manifest["radius"] >= 32


def test_a_long_list_draws_only_what_is_seen(visit, tmp_path):
    write_large(tmp_path, latents=12_000, rows=200, length=64, each=2)
    tab = visit(page.write(tmp_path).as_uri() + "#latent=9876")
    open_latent(tab, 9876)
    assert tab.locator(".row.chosen").is_visible()
    assert tab.locator(".row").count() < 60
    tab.fill("#search", "#1199")
    wait_for(tab, [1199, *range(11_990, 12_000)])


def write_large(run: Path, latents: int, rows: int, length: int, each: int = 55) -> None:
    """A run of many latents that fire anywhere, every hundredth on every token: as much as a page may have to hold."""
    rng = np.random.default_rng(0)
    sizes = {"f": latents, "f+1": latents + 1, "E": latents * each, "B": 50, "L": 20, "N": 20, "2": 2, "3": 3, "6": 6}
    position = rng.integers(1, length, sizes["E"])
    spread = [
        np.arange(length) if e // each % 100 == 0 else np.unique([p, (p * 7) % length, (p * 3) % length])
        for e, p in enumerate(position)
    ]
    offsets = np.cumsum([0, *map(len, spread)])
    sizes |= {"E+1": len(offsets), "A": int(offsets[-1])}
    columns = {name: rng.integers(0, 3, [sizes[axis] for axis in axes]) for name, (_, axes) in COLUMNS.items()}
    columns |= {
        "count": rng.integers(1, 1000, latents),
        "max": np.full(latents, 10),
        "example_offsets": np.arange(latents + 1) * each,
        "example_group": np.tile(np.sort(np.arange(each) % 7), latents),
        "example_row": rng.integers(0, rows, sizes["E"]),
        "example_position": position,
        "example_value": rng.random(sizes["E"]) * 10,
        "activation_offsets": offsets,
        "activation_position": np.concatenate(spread),
        "activation_value": rng.random(sizes["A"]) * 10,
        "logit_range": np.tile([-1, 1], (latents, 1)),
        "hist_range": np.tile([0, 10], (latents, 1)),
    }
    records = run / "explorer" / "records"
    vocabulary = [b" t%d" % i for i in range(32_768)]
    text = TextsHeader(VERSION, rows, length, len(vocabulary), 0, [0], "large", "all", "none", "cd" * 32, 0)
    Texts.write(records / "texts", text, rng.integers(0, len(vocabulary), (rows, length)), vocabulary)
    header = Header(VERSION, toy.HOOK, 2, 8, latents, "topk", "ef" * 32, rows * length, 1.0, 0, {})
    Store.write(records / toy.HOOK, header, columns)


# ---- with the server behind it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(browser, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a real `experiments.explore --serve`, on the demo as a chat checkpoint, and its run."""
    folder = tmp_path_factory.mktemp("live")
    demo = Path(bridge.nanochat.__file__).parent / "demo"
    checkpoint = folder / "chatsft_checkpoints" / "demo"
    shutil.copytree(demo, checkpoint)
    run = folder / "runs" / "live"
    fingerprint = bridge.nanochat.load(checkpoint).fingerprint
    for hook, seed in ((toy.HOOK, 0), (OTHER, 1)):
        sae = toy_sae("topk", C, 192, seed=seed, k=8, hook_name=hook, model_fingerprint=fingerprint)
        export(sae, run / "sae" / hook)
    text = folder / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "jsae").glob("*.py"))[:4]))
    rundir.record(run, RunConfig(checkpoint=str(checkpoint), data=str(text)), {"model": fingerprint})
    command = [
        sys.executable,
        "-m",
        "experiments.explore",
        f"--run_dir={run}",
        "--num_tokens=6000",
        "--serve",
        "--port=0",
    ]
    with server(command) as url:
        yield url, run


@contextlib.contextmanager
def server(command: list[str]) -> Iterator[str]:
    """The address that a serving process prints; the process ends with the context."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            told = []
            for line in process.stdout:
                told.append(line)
                if found := re.search(r"explorer at (http://\S+)", line):
                    break
            else:
                pytest.fail("the server did not start: " + "".join(told))
            yield found[1]
        finally:
            process.terminate()
            process.communicate(timeout=20)


def test_a_page_on_a_server_of_plain_files_is_the_static_one(visit, run):
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(run / "explorer")]
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
        stack.callback(process.terminate)
        port = re.search(r"port (\d+)", process.stdout.readline())[1]
        tab = visit(f"http://127.0.0.1:{port}/index.html#latent=0", expected="404")
        open_latent(tab, 0)
        assert tab.locator("#tabs a").count() == 0
        assert tab.locator("#push, #rename, .try").count() == 0


def test_typed_text_shows_the_strongest_features_of_every_token(visit, live):
    tab = visit(f"{live[0]}#hook={toy.HOOK}&view=text")
    tab.fill("#typed", "def mean(values):\n    return <script>alert(1)</script> é")
    tab.wait_for_selector(".perToken li")
    strip = tab.locator(".strip .tok")
    assert "".join(strip.all_text_contents()).startswith("def mean(values):\n    return <script>alert(1)")
    assert tab.locator(".perToken li").count() == strip.count()
    values = [float(v) for v in tab.locator(".perToken li >> nth=2").locator(".number").all_inner_texts()]
    assert len(values) == 5
    assert values == sorted(values, reverse=True)
    strip.nth(2).hover()
    assert "position" in tab.inner_text("#tip")
    first = tab.locator(".perToken .feature").first
    latent = int(first.locator(".id").inner_text().removeprefix("#"))
    first.click()
    open_latent(tab, latent)
    tab.wait_for_selector(".try .hot")  # the text is still there, now with this latent's part in it
    assert "fires on" in tab.inner_text(".try")


def test_a_latent_is_tried_on_a_text_of_ones_own(visit, live):
    tab = visit(f"{live[0]}#hook={OTHER}&latent=5")
    open_latent(tab, 5)
    tab.fill(".try textarea", "class Store:\n    pass " * 4)
    tab.wait_for_selector(".try .tok")
    tab.hover(".try .tok >> nth=1")
    assert "activation" in tab.inner_text("#tip")
    assert re.search("fires on [0-9]+ of|does not fire", tab.inner_text(".try"))


def test_steering_writes_both_continuations_side_by_side(visit, live):
    tab = visit(f"{live[0]}#hook={toy.HOOK}&latent=3")
    open_latent(tab, 3)
    tab.click("#push")
    tab.wait_for_selector(".push[data-latent='3']")
    tab.fill("#find", "#7")
    tab.click(".found button >> nth=0")
    tab.wait_for_selector(".push[data-latent='7']")
    tab.click("text=Continue")
    tab.fill("#prompt", "def read(self):")
    tab.fill("#set-max_tokens", "24")
    tab.fill("[aria-label='Strength of #3, exactly']", "60")
    assert float(tab.input_value("[aria-label='Strength of #3']")) > 0
    tab.select_option("[aria-label='Mode of #7']", "ablate")
    assert tab.locator("[aria-label='Strength of #7']").count() == 0
    tab.click("#go")
    texts = [written(tab, which) for which in ("default", "steered")]
    assert texts[0] != texts[1]
    assert all(text.startswith("def read(self):") and len(text) > 20 for text in texts)
    assert tab.locator(".sheet[data-which=steered] .hot").count() > 0
    tab.hover(".sheet[data-which=steered] .tok >> nth=1")
    assert "token" in tab.inner_text("#tip")
    tab.click("[aria-label='Take #3 away']")
    tab.click("[aria-label='Take #7 away']")
    tab.click("#go")
    assert written(tab, "default") == texts[0]  # without features there is one continuation, the same
    assert tab.locator(".sheet").count() == 1


def written(tab: Any, which: str) -> str:
    """The text of a sheet that is finished."""
    sheet = f".sheet[data-which={which}]"
    tab.wait_for_selector(f"{sheet} h2 small:not(.writing)")
    return tab.locator(f"{sheet} .text").text_content()


def test_a_continuation_streams_and_is_stopped(visit, live):
    tab = visit(f"{live[0]}#hook={toy.HOOK}&latent=3")
    open_latent(tab, 3)
    tab.click("#push")
    tab.wait_for_selector(".push")
    tab.fill("#prompt", "import ")
    tab.fill("#set-max_tokens", "256")
    tab.click("#go")
    tab.wait_for_selector(".sheet[data-which=steered] .tok")
    assert tab.locator("#stop").is_enabled()
    tab.click("#stop")
    tab.wait_for_selector("text=stopped")
    count = tab.locator(".sheet .tok").count()
    assert 0 < count < 512
    tab.wait_for_timeout(300)
    assert tab.locator(".sheet .tok").count() == count
    assert tab.locator("#stop").is_disabled()


def test_a_chat_goes_on_from_the_side_that_is_chosen(visit, live):
    tab = visit(f"{live[0]}#view=steer")
    tab.wait_for_selector("#find")
    tab.fill("#find", "#11")
    tab.click(".found button >> nth=0")
    tab.click("text=Chat")
    tab.fill("#set-max_tokens", "8")
    asked: list[dict[str, Any]] = []
    tab.on(
        "request", lambda request: asked.append(request.post_data_json) if request.url.endswith("/api/steer") else None
    )
    for said in ("What is a list?", "And a <b>tuple</b>?"):
        tab.fill("#prompt", said)
        tab.keyboard.press("Enter")
        tab.wait_for_selector(f".turn:has-text('{said}') .follow")
    assert tab.locator(".said").all_inner_texts() == ["What is a list?", "And a <b>tuple</b>?"]
    first = tab.locator(".turn").first.locator(".sheet[data-which=steered] .text").text_content()
    assert [m["role"] for m in asked[1]["messages"]] == ["user", "assistant", "user"]
    assert jsae_shown(tab, asked[1]["messages"][1]["content"]) == first
    tab.click("text=Start anew")
    assert tab.locator(".turn").count() == 0


def jsae_shown(tab: Any, text: str) -> str:
    return tab.evaluate("text => jsae.tokens.shown(text)", text)


def test_a_name_is_kept_in_the_file_and_on_the_page(visit, live):
    url, run = live
    tab = visit(f"{url}#hook={toy.HOOK}&latent=9")
    open_latent(tab, 9)
    tab.click("#rename")
    tab.fill("#label", "a name <i>of mine</i>")
    tab.fill("#note", "two\nlines")
    tab.click("#keep")
    tab.wait_for_selector("h1:has-text('a name <i>of mine</i>')")
    assert labels.Names.read(run, toy.HOOK)[9] == labels.Name("a name <i>of mine</i>", "two\nlines", by_person=True)
    assert "a name <i>of mine</i>" in tab.inner_text(".row[data-latent='9']")
    tab.reload()  # the files of the page are older than the name: the server tells it
    tab.wait_for_selector("h1:has-text('a name <i>of mine</i>')")
    assert "two\nlines" in tab.inner_text(".note")
    tab.click("#rename")
    tab.fill("#label", "")
    tab.fill("#note", "")
    tab.click("#keep")
    tab.wait_for_selector("h1:has-text('no label')")
    assert len(labels.Names.read(run, toy.HOOK)) == 0


def test_what_the_server_refuses_is_shown(visit, live):
    tab = visit(f"{live[0]}#hook={toy.HOOK}&view=text", expected="status of 4")
    tab.fill("#typed", "word " * 3000)
    tab.wait_for_selector(".traced [role=alert]")
    assert "1024" in tab.inner_text(".traced [role=alert]").replace(",", "")
    tab.goto(f"{live[0]}#view=steer")
    tab.click("text=Continue")
    tab.fill("#prompt", "word " * 3000)
    tab.click("#go")
    tab.wait_for_selector(".sheet h2 .bad")


@pytest.mark.parametrize("view", ["text", "steer"])
def test_the_live_part_fits_a_phone(visit, live, view):
    tab = visit(f"{live[0]}#view={view}", viewport=PHONE, has_touch=True, is_mobile=True)
    tab.wait_for_selector("#typed, #prompt")
    if view == "text":
        tab.fill("#typed", "for name in names: pass")
        tab.wait_for_selector(".perToken li")
    else:
        tab.fill("#find", "#1")
        tab.click(".found button >> nth=0")
        tab.wait_for_selector(".push")
    for place in ("document.documentElement", "document.querySelector('main')"):
        wide, room = tab.evaluate(f"[{place}.scrollWidth, {place}.clientWidth]")
        assert wide <= room <= PHONE["width"]
