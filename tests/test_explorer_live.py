"""The explorer's page with the running model behind it: a real server in a process of its own, a real Chromium."""

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import explorer_toy as toy
import numpy as np
import pytest
import torch
from chromium import ENOUGH, PHONE, assert_fits, contrasts, open_latent, push
from live_explorer import serving
from toy_saes import export, toy_sae

import bridge.nanochat
from bridge import lenses
from bridge.explorer import page
from bridge.run import directory as rundir
from bridge.run import labels
from experiments.train import RunConfig
from jsae.records.store import Store

ROOT = Path(__file__).resolve().parents[1]
OTHER = "blocks.1.hook_mlp_out"
C = 128


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
    lenses.save(lenses.JacobianLens({i: torch.eye(C) for i in range(6)}, 20), run / "lenses" / "jacobian.pt")
    text = folder / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "jsae").glob("*.py"))[:4]))
    rundir.record(run, RunConfig(checkpoint=str(checkpoint), data=str(text)), {"model": fingerprint})
    with serving(run, "--num_tokens=6000") as url:
        yield url, run


def test_a_page_on_a_server_of_plain_files_is_the_static_one(visit, tmp_path):
    toy.write_store(tmp_path)
    folder = page.write(tmp_path).parent
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(folder)]
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
        stack.callback(process.terminate)
        port = re.search(r"port (\d+)", process.stdout.readline())[1]
        tab = visit(f"http://127.0.0.1:{port}/index.html#latent=0", expected="404")
        open_latent(tab, 0)
        assert tab.locator("#tabs a:visible").all_inner_texts() == ["Latents", "Lists"]
        assert tab.locator("#push, #rename, .try").count() == 0


def test_typed_text_shows_the_strongest_features_of_every_token(visit, live):
    tab = visit(f"{live[0]}#hook={toy.HOOK}&view=text")
    tab.fill("#typed", "def mean(values):\n    return <script>alert(1)</script> é")
    tab.wait_for_selector(".perToken li")
    strip = tab.locator(".strip .tok")
    assert "".join(strip.all_text_contents()).startswith("def mean(values):\n    return <script>alert(1)")
    assert tab.locator(".perToken li").count() == strip.count()
    store = Store(live[1] / "explorer" / "records" / toy.HOOK)
    sparse = set(np.flatnonzero(store["count"] <= 0.1 * store.header.tokens).tolist())
    assert shown_features(tab) <= sparse  # those that fire nearly everywhere tell little
    tab.check("#dense")
    assert not shown_features(tab) <= sparse
    values = [float(v) for v in tab.locator(".perToken li >> nth=2").locator(".number").all_inner_texts()]
    assert len(values) == 5
    assert values == sorted(values, reverse=True)
    strip.nth(2).hover()
    assert "position" in tab.inner_text("#tip")
    told = tab.inner_text("#tip")
    tab.focus(".strip")
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#tip") == told
    assert [one for one in contrasts(tab) if one[0] < ENOUGH] == []
    first = tab.locator(".perToken .feature").first
    latent = int(first.locator(".id").inner_text().removeprefix("#"))
    first.click()
    open_latent(tab, latent)
    tab.wait_for_selector(".try .hot")  # the text is still there, now with this latent's part in it
    assert "fires on" in tab.inner_text(".try")


def shown_features(tab: Any) -> set[int]:
    """The latents that stand beside the tokens of a text."""
    return {int(told.removeprefix("#")) for told in tab.locator(".perToken .feature .id").all_inner_texts()}


def test_a_latent_is_tried_on_a_text_of_ones_own(visit, live):
    tab = visit(f"{live[0]}#hook={OTHER}&latent=5")
    open_latent(tab, 5)
    tab.fill(".try textarea", "class Store:\n    pass " * 4)
    tab.wait_for_selector(".try .tok")
    tab.hover(".try .tok >> nth=1")
    assert "activation" in tab.inner_text("#tip")
    assert re.search("fires on [0-9]+ of|does not fire", tab.inner_text(".try"))


def test_a_text_shows_what_every_layer_expects(visit, live):
    text = "def mean(values):\n    return <b>x</b>"
    nano = bridge.nanochat.load("demo")
    ids = torch.tensor(nano.tokenizer.encode(text, prepend_bos=True))
    tab = visit(f"{live[0]}#hook={toy.HOOK}&view=lens", expected="400")
    tab.fill("#lensed", text)
    tab.wait_for_selector(".lenstable td")
    rows = tab.locator(".lenstable tbody tr")
    assert rows.locator("th").all_inner_texts() == ["output", "4", "3", "2", "1", "0"]
    assert rows.locator("th").nth(3).evaluate("th => th.parentElement.className") == "own"
    assert tab.locator(".lenstable thead th").count() == 1 + len(ids)
    streams = lenses.read(nano.model, ids[None])
    for name, lens in {"direct": lenses.DirectLens, "logit": lenses.LogitLens}.items():
        tab.click(f".segmented [data-value={name}]")
        table = lenses.table(nano.model, lens(nano.model), streams, ids, top=1)
        cell = "document.querySelectorAll('.lenstable tbody tr')[1].cells[5]"
        wanted = f"{float(table.probabilities[4, 4, 0]):.3f}"
        tab.wait_for_function(f"wanted => {cell}.style.getPropertyValue('--h') == wanted", arg=wanted)
        assert rows.nth(0).locator(".hit").count() == int((table.ranks[5] == 0).sum())
    tab.focus(".lenstable")
    for key in ("ArrowDown", "ArrowRight", "ArrowDown"):
        tab.keyboard.press(key)
    assert tab.evaluate("[document.activeElement.cellIndex, document.activeElement.parentElement.rowIndex]") == [2, 2]
    assert "next token" in tab.locator("#tip").inner_text()
    assert "entropy" in tab.locator("#tip").inner_text()
    tab.click(".segmented [data-value=next]")
    tab.wait_for_selector(".lenstable td")
    assert "No tuned lens yet" in tab.locator(".absent").inner_text()
    tab.fill("#lensed", "x " * 3000)
    tab.wait_for_selector(".traced .bad")
    tab.fill("#lensed", "import os")
    tab.wait_for_selector(".lenstable td")
    tab.click("#tabs [data-view=text]")
    assert tab.input_value("#typed") == "import os", "both views have one text"
    tab.click("#tabs [data-view=lens]")
    tab.wait_for_selector(".lenstable td")
    assert min(contrasts(tab))[0] >= ENOUGH, min(contrasts(tab))


def test_a_latent_shows_what_it_writes_through_later_layers(visit, live):
    tab = visit(f"{live[0]}#hook={toy.HOOK}&latent=3")
    tab.wait_for_selector(".lenscard table")
    card = tab.locator(".lenscard")
    assert "over 20 prompts" in card.inner_text()
    assert card.locator("caption").all_inner_texts() == ["Raised", "Lowered"]
    nano = bridge.nanochat.load("demo")
    W_dec = bridge.load_sae(live[1] / "sae" / toy.HOOK).W_dec
    (direct, through) = lenses.written(nano.model, W_dec[3], 2, lenses.load(live[1] / "lenses" / "jacobian.pt"))
    assert f"{through.top_values[0]:.2f}" in card.inner_text()
    assert f"{direct.overlap(through)} of its ten most raised tokens" in card.inner_text()


def test_steering_writes_both_continuations_side_by_side(visit, live):
    tab = visit(f"{live[0]}#hook={toy.HOOK}&latent=3")
    push(tab, 3, 7)
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
    assert [one for one in contrasts(tab) if one[0] < ENOUGH] == []
    tab.hover(".sheet[data-which=steered] .tok >> nth=1")
    assert "token" in tab.inner_text("#tip")
    tab.click("[aria-label='Remove #3']")
    tab.click("[aria-label='Remove #7']")
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
    tab.click("text=Start over")
    assert tab.locator(".turn").count() == 0


def jsae_shown(tab: Any, text: str) -> str:
    return tab.evaluate("text => jsae.tokens.shown(text)", text)


def test_a_name_is_saved_in_the_file_and_on_the_page(visit, live):
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
    tab.wait_for_selector("h1:not(:has-text('a name'))")
    names = labels.Names.read(run, toy.HOOK)
    assert tab.inner_text("h1") == (names.automatic(9).label or tab.evaluate("jsae.list.current.title(9)"))
    assert not any(names[latent].by_person for latent in names)


def test_refusals_of_the_server_are_shown(visit, live):
    tab = visit(f"{live[0]}#hook={toy.HOOK}&view=text", expected="status of 4")
    tab.fill("#typed", "word " * 3000)
    tab.wait_for_selector(".traced [role=alert]")
    assert "1024" in tab.inner_text(".traced [role=alert]").replace(",", "")
    tab.goto(f"{live[0]}#view=steer")
    tab.click("text=Continue")
    tab.fill("#prompt", "word " * 3000)
    tab.click("#go")
    tab.wait_for_selector(".sheet h2 .bad")


@pytest.mark.parametrize("view", ["text", "lens", "steer"])
def test_the_live_part_fits_a_phone(visit, live, view):
    tab = visit(f"{live[0]}#view={view}", viewport=PHONE, has_touch=True, is_mobile=True)
    tab.wait_for_selector("#typed, #lensed, #prompt")
    if view == "lens":
        tab.fill("#lensed", "for name in names: pass")
        tab.wait_for_selector(".lenstable td")
    elif view == "text":
        tab.fill("#typed", "for name in names: pass")
        tab.wait_for_selector(".perToken li")
    else:
        tab.fill("#find", "#1")
        tab.click(".found button >> nth=0")
        tab.wait_for_selector(".push")
    assert_fits(tab, "main")


def test_steering_starts_gently_and_says_when_the_model_repeats_itself(visit, live):
    url, run = live
    store = Store(run / "explorer" / "records" / toy.HOOK)
    tab = visit(f"{url}#hook={toy.HOOK}&latent=3")
    open_latent(tab, 3)
    tab.click("#push")
    tab.wait_for_selector(".push[data-latent='3']")
    strength = float(tab.input_value("[aria-label='Strength of #3, exactly']"))
    usual, largest = float(store["mean"][3]), float(store["max"][3])
    assert strength == pytest.approx(min(2 * usual, largest), rel=0.01)
    assert 0 < strength < largest
    tab.click("text=Continue")
    tab.fill("#prompt", "import ")
    tab.fill("#set-max_tokens", "40")
    tab.fill("#set-temperature", "0")
    tab.fill("[aria-label='Strength of #3, exactly']", "5000")
    tab.click("#go")
    written(tab, "steered")
    told = tab.inner_text(".sheet[data-which=steered] .repeats")
    assert "It repeats itself" in told
    assert "smaller strength" in told


@pytest.mark.parametrize(
    ("ids", "period"),
    [
        ([1, 2, 3] * 4, 3),
        ([9, 8, *[5] * 8], 1),
        ([5] * 7, 0),
        ([1, 2] * 3 + [1], 0),
        (list(range(40)), 0),
        ([*[5] * 9, 1], 0),
    ],
)
def test_repetition_at_the_end_of_a_text_is_detected(visit, live, ids, period):
    tab = visit(live[0])
    assert tab.evaluate("ids => jsae.steer.period(ids)", ids) == period


def test_a_chat_with_a_base_checkpoint_says_so(visit, live):
    tab = visit(f"{live[0]}#view=steer")
    tab.click("text=Chat")
    assert tab.locator(".ask .repeats").is_hidden()  # it lies in chatsft_checkpoints
    tab.evaluate("jsae.live.model.trained_to_chat = false")
    tab.click("text=Continue")
    assert tab.locator(".ask .repeats").is_hidden()
    tab.click("text=Chat")
    assert "not trained to chat" in tab.inner_text(".ask .repeats")
