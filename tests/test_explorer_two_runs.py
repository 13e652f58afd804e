"""Two runs on one page of the explorer: what is checked, how their records are joined, and what the page shows."""

import json
from collections.abc import Iterator
from pathlib import Path

import explorer_toy as toy
import numpy as np
import pytest
from chromium import ENOUGH, PHONE, assert_fits, contrasts, open_latent
from live_explorer import MLP, RESID, C, serving
from toy_saes import export, toy_sae

import bridge.nanochat
from bridge import exploration
from bridge.explorer import across, page, parts
from bridge.run import Run
from bridge.run import directory as rundir
from experiments.train import RunConfig
from jsae.records.store import Store
from jsae.saelens.settings import WEIGHTS
from jsae.settings import ConfigError

OTHER = "blocks.1.hook_mlp_out"


def write_runs(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[Path, Path]:
    """Write two runs with SAEs of different weights at one hook; with monkeypatch, the second on texts of its own."""
    one, two = folder / "one", folder / "two"
    toy.write_store(one)
    if monkeypatch is not None:
        rows = toy.tokens()[::-1]
        monkeypatch.setattr(toy, "tokens", lambda: rows)
    toy.write_store(two, seed=1)
    toy.write_store(two, OTHER, seed=2)
    return one, two


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs on different texts, and the page of the first with both."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        one, two = write_runs(tmp_path_factory.mktemp("runs"), monkeypatch)
    page.write(one, second=two)
    return one, two


@pytest.fixture(scope="module")
def address(runs) -> str:
    return (runs[0] / "explorer" / "index.html").as_uri()


def decoder(run: Path, hook: str = toy.HOOK) -> np.ndarray:
    from safetensors.numpy import load_file

    rows = load_file(run / "sae" / hook / WEIGHTS)["W_dec"].astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def data(run: Path, name: str):
    (file,) = (run / "explorer").glob(f"page-*/{name}.js")
    return json.loads(file.read_text().partition(",")[2].removesuffix(");\n"))


def rewrite_texts(run: Path, **changes) -> None:
    file = run / "explorer" / "records" / "texts" / "texts.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- the files -----------------------------------------------------------------------------------------------------


def test_records_of_the_second_run_follow_under_its_name(runs):
    hooks = data(runs[0], "manifest")["hooks"]
    assert [one["name"] for one in hooks] == [toy.HOOK, f"two/{OTHER}", f"two/{toy.HOOK}"]
    assert [one["run"] for one in hooks] == [None, "two", "two"]
    assert data(runs[0], "manifest")["rows"] == 2 * toy.ROWS
    assert [one.get("across", {}).get("hook") for one in hooks] == [2, None, 0]


def test_texts_that_both_runs_share_are_written_once(tmp_path):
    one, two = write_runs(tmp_path)
    page.write(one, second=two)
    assert data(one, "manifest")["rows"] == toy.ROWS


def test_the_nearest_latents_of_the_other_run_are_those_of_largest_cosine():
    rng = np.random.default_rng(0)
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 40, 8)))
    b[7] = -a[3]
    b[9] = a[3]
    ids, cosines = across.nearest(a.astype(np.float32), b.astype(np.float32))
    expected = np.argsort(-(a @ b.T), axis=1)[:, : across.NEAREST]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(cosines, np.take_along_axis(a @ b.T, expected, 1), atol=1e-6)
    assert ids[3, 0] == 9
    assert 7 not in ids[3]


def test_a_run_beside_itself_and_one_without_records_are_refused(tmp_path):
    one, _ = write_runs(tmp_path)
    with pytest.raises(ConfigError, match="is the run itself"):
        page.write(one, second=one)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no records.*experiments\.explore --run_dir"):
        page.write(one, second=tmp_path / "empty")


def test_rows_of_another_length_are_refused_before_anything_is_gathered(tmp_path):
    one, two = write_runs(tmp_path)
    with pytest.raises(ConfigError, match="read in rows of 12 tokens: give --context_length=12"):
        parts.check_second(Run(one), Run(two), 128)
    parts.check_second(Run(one), Run(two), 12)


def test_a_run_of_another_model_is_refused(tmp_path):
    one, two = write_runs(tmp_path)
    rewrite_texts(two, fingerprint="cd" * 32)
    with pytest.raises(ConfigError, match="read with another model, nanochat-toy cdcdcdcdcdcd"):
        page.write(one, second=two)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    one, two = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for number, run in enumerate((one, two)):
        toy.write_store(run, seed=number)
    page.write(one, second=two)
    assert [hook["name"] for hook in data(one, "manifest")["hooks"]] == [toy.HOOK, f"b/run/{toy.HOOK}"]


def test_without_an_export_directions_are_not_compared(tmp_path):
    one, two = write_runs(tmp_path)
    for file in (two / "sae" / toy.HOOK).iterdir():
        file.unlink()
    page.write(one, second=two)
    assert all("across" not in hook for hook in data(one, "manifest")["hooks"])


# ---- the page ------------------------------------------------------------------------------------------------------


def test_a_latent_shows_the_nearest_of_the_other_run_and_its_own_texts(visit, address, runs):
    tab = visit(f"{address}#hook={toy.HOOK}&latent={toy.ORDINARY}")
    open_latent(tab, toy.ORDINARY)
    cosines = decoder(runs[0])[toy.ORDINARY] @ decoder(runs[1]).T
    card = tab.locator(".card", has_text="In two")
    assert card.locator(".picks li").first.inner_text().split()[0] == f"#{cosines.argmax()}"
    assert f"{cosines.max():.2f}" in card.inner_text()
    tab.evaluate(f"location.hash = '#hook=two/{toy.HOOK}&latent={toy.ORDINARY}'")
    tab.wait_for_function("() => document.querySelector('#hook').value === '2'")
    tab.wait_for_selector(".latent .example mark, .latent .example .hot")
    store = Store(runs[1] / "explorer" / "records" / toy.HOOK)
    row, position = store["example_row"][0], store["example_position"][0]
    token = toy.VOCABULARY[store.texts.tokens[row, position]].decode()
    hottest = tab.locator(".latent .example").first.locator("[data-peak], .peak, .hot").first
    assert token.strip() in tab.locator(".latent .example").first.inner_text()
    assert hottest.count() == 1


def test_two_latents_of_two_runs_are_compared_with_their_cosine(visit, address, runs):
    a, b = toy.ORDINARY, toy.DENSE
    tab = visit(f"{address}#view=compare&a=0,{a}&b=2,{b}", wait=".twins")
    cosine = decoder(runs[0])[a] @ decoder(runs[1])[b]
    assert f"Cosine of the decoder directions: {cosine:.2f}." in tab.inner_text(".title")
    assert f"two/{toy.HOOK}" in tab.locator(".twins > section").nth(1).inner_text()
    assert [one for one in contrasts(tab) if one[0] < ENOUGH] == []
    other = visit(f"{address}#view=compare&a=0,{a}&b=1,{b}", wait=".twins")
    assert "are not compared" in other.inner_text(".title")


def test_both_runs_fit_a_phone(visit, address):
    tab = visit(f"{address}#hook=two/{toy.HOOK}&latent={toy.ORDINARY}", viewport=PHONE)
    open_latent(tab, toy.ORDINARY)
    assert_fits(tab, "#main")


def test_the_overview_counts_latents_that_are_alike(visit, address, runs):
    tab = visit(f"{address}#hook={toy.HOOK}", wait=".overview")
    alike = int((decoder(runs[0]) @ decoder(runs[1]).T).max(axis=1).__ge__(across.ALIKE).sum())
    tile = tab.locator(".tile", has_text="alike in two")
    assert tile.locator("b").inner_text() == str(alike)


# ---- live ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(browser, tmp_path_factory) -> Iterator[str]:
    """The address of `explore --with_run --serve`, with two runs on the demo."""
    folder = tmp_path_factory.mktemp("live")
    text = folder / "text.txt"
    text.write_text("\n".join(file.read_text() for file in sorted(Path(parts.__file__).parent.glob("*.py"))))
    fingerprint = bridge.nanochat.load("demo").fingerprint
    one, two = folder / "one", folder / "two"
    for run, hook, seed in ((one, RESID, 0), (two, RESID, 1), (two, MLP, 2)):
        sae = toy_sae("topk", C, 192, seed=seed, k=8, hook_name=hook, model_fingerprint=fingerprint)
        export(sae, run / "sae" / hook)
    for run in (one, two):
        rundir.record(run, RunConfig(checkpoint="demo", data=str(text)), {"model": fingerprint})
    exploration.explore(exploration.of_run(Run(two)), exploration.Extent(num_tokens=3000))
    with serving(one, f"--with_run={two}", "--num_tokens=3000") as url:
        yield url


def test_a_server_tries_and_steers_only_its_own_run(visit, live):
    tab = visit(f"{live}#hook={RESID}&latent=5")
    open_latent(tab, 5)
    assert tab.locator("#push, #rename, .try").count() == 3
    assert tab.locator(".card", has_text="In two").count() == 1
    tab.select_option("#hook", label=f"two/{RESID}")
    tab.evaluate(f"location.hash = '#hook=two/{RESID}&latent=5'")
    tab.wait_for_selector(".card:has-text('In one')")
    assert tab.locator("#push, #rename, .try").count() == 0
    assert tab.locator("#tabs a:visible").all_inner_texts() == ["Latents", "Your text", "Lenses", "Steer", "Lists"]


def test_views_of_the_server_show_its_own_run_until_another_is_chosen(visit, live):
    tab = visit(f"{live}#hook=two/{RESID}&view=text", wait="#typed")
    assert tab.input_value("#hook") == "0"
    tab.fill("#typed", "def mean(values):")
    tab.wait_for_selector(".perToken .feature")
    tab.select_option("#hook", label=f"two/{RESID}")
    tab.wait_for_selector(".overview")
    assert f"two/{RESID}" in tab.inner_text(".overview header")
    assert tab.input_value("#hook") == "1"


def test_a_link_pushes_only_what_the_server_has(visit, live):
    pushes = "&".join(f"push={hook},5,clamp,20,all" for hook in (f"two/{RESID}", RESID, MLP))
    tab = visit(f"{live}#view=steer&prompt=return&max_tokens=4&{pushes}", wait=".push")
    assert tab.locator(".push").count() == 1
    tab.click("#go")
    tab.wait_for_selector(".sheet[data-which=steered] small:not(.writing)")
    assert tab.locator(".sheet[data-which=steered] .bad").count() == 0
