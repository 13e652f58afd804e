"""Lenses on the explorer's page without a server: tables of texts, and what latents write through later layers."""

import base64
import json

import explorer_toy as toy
import numpy as np
import pytest
import torch
from chromium import ENOUGH, PHONE, assert_fits, contrasts, open_latent, wait_for_address
from test_explorer_live import live  # noqa: F401

from bridge import lenses, torch_sae
from bridge.explorer import lens_sample, page
from bridge.lenses import fitting
from bridge.run import Run


@pytest.fixture(scope="module")
def run(live) -> Run:  # noqa: F811
    """A run with records of two SAEs and a Jacobian lens, explored."""
    return Run(live[1])


@pytest.fixture(scope="module")
def address(run) -> str:
    return run.page_file.as_uri()


def content(run: Run) -> dict:
    return json.loads(run.lens_tables_file.read_text())


def test_tables_are_those_of_the_lenses_on_texts_of_the_records(run):
    nano = run.model()
    texts = run.records(toy.HOOK).texts
    (first, *others) = content(run)["texts"]
    assert len(others) == lens_sample.TEXTS - 1
    assert set(first["lenses"]) == {"logit", "direct", "jacobian"}
    ids = torch.tensor(texts.tokens[first["row"], : lens_sample.TOKENS].astype(int))
    assert first["ids"] == ids.tolist()
    table = lenses.table(nano.model, lenses.DirectLens(nano.model), lenses.read(nano.model, ids[None]), ids, top=3)
    assert first["lenses"]["direct"]["ids"] == table.tokens.tolist()
    assert first["lenses"]["direct"]["ranks"] == table.ranks.tolist()


def test_latents_write_what_the_lens_says_of_their_decoder_rows(run):
    nano = run.model()
    jacobian = fitting.load(nano, run.lens_file("jacobian"))
    _, columns = lens_sample.read(run)
    direction = torch_sae.load(run.sae_folder(toy.HOOK)).W_dec[5]
    _, through = lenses.written(nano.model, direction, 2, jacobian, lens_sample.WRITTEN)
    size = run.records(toy.HOOK).header.d_sae

    def row(name: str, kind: str) -> torch.Tensor:
        values = np.frombuffer(base64.b64decode(columns[toy.HOOK][name]), kind).reshape(size, -1)[5]
        return torch.from_numpy(values.astype(np.float64))

    assert row("top", "<u2").tolist() == through.top.tolist()
    torch.testing.assert_close(row("top_values", "<f4").float(), through.top_values, atol=1e-4, rtol=1e-4)
    assert row("bottom", "<u2").tolist() == through.bottom.tolist()


def test_the_file_is_written_again_only_for_another_lens(run):
    before = run.lens_tables_file.stat().st_mtime_ns
    nano, saes = run.model(), run.saes()
    lens_sample.write(run, nano, saes)
    assert run.lens_tables_file.stat().st_mtime_ns == before


@pytest.mark.parametrize("broken", ["{", "[]", '{"texts": 1, "latents": {}}', '{"texts": [], "latents": {"HOOK": {}}}'])
def test_a_broken_file_is_named(tmp_path, broken):
    toy.write_store(tmp_path)
    run = Run(tmp_path)
    run.lens_tables_file.write_text(broken.replace("HOOK", toy.HOOK))
    with pytest.raises(ValueError, match=r"lenses\.json is broken, `python -m experiments\.explore"):
        page.write(tmp_path)


def test_a_page_from_disk_shows_lenses_on_its_texts_and_keeps_them_in_its_address(visit, address, run):
    tab = visit(f"{address}#view=lens", wait=".lenstable")
    texts = content(run)["texts"]
    assert tab.locator(".lenstable tbody tr").count() == len(texts[0]["lenses"]["direct"]["layers"])
    tab.click("[aria-label=Text] [data-value='3']")
    tab.click("[aria-label=Lens] [data-value=jacobian]")
    wait_for_address(tab, "lens=jacobian", "sample=3", "hook=")
    tab.reload()
    tab.wait_for_selector(".lenstable")
    assert tab.get_attribute("[aria-label=Text] [data-value='3']", "aria-pressed") == "true"
    assert tab.get_attribute("[aria-label=Lens] [data-value=jacobian]", "aria-pressed") == "true"
    assert tab.locator(".lenstable thead th").count() == 1 + len(texts[2]["ids"])
    assert "No tuned lens yet" in tab.inner_text(".absent")
    assert [one for one in contrasts(tab) if one[0] < ENOUGH] == []


def test_a_page_from_disk_shows_what_a_latent_writes_through_later_layers(visit, address):
    tab = visit(f"{address}#hook={toy.HOOK}&latent=5")
    open_latent(tab, 5)
    card = tab.locator(".lenscard")
    assert card.locator("tbody tr").count() == 2 * lens_sample.WRITTEN
    assert "over 20 prompts" in card.inner_text()


def test_a_page_without_lenses_has_no_view_of_them(visit, tmp_path):
    toy.write_store(tmp_path)
    tab = visit(page.write(tmp_path).as_uri() + "#view=lens", wait=".overview")
    assert tab.locator("#tabs a[data-view=lens]").count() == 0


def test_lenses_and_their_choices_fit_a_phone(visit, address):
    tab = visit(f"{address}#view=lens", wait=".lenstable", viewport=PHONE)
    assert_fits(tab, "#main")
    assert tab.locator("#tabs a[data-view=lens]").is_visible()
