"""The explorer's page of a run whose latents were compared with those of other seeds, in a real Chromium."""

import json

import explorer_toy as toy
from chromium import shown, wait_for

from bridge.explorer import page
from jsae.records.store import digest

SHARES = [0.5, None, 1.0, 0.0, 1.0, 0.5, 0.0, 0.5]


def test_the_list_has_a_badge_a_filter_and_an_order_of_seeds(visit, tmp_path):
    toy.write_store(tmp_path)
    entry = {"sae": digest(tmp_path / "sae" / toy.HOOK), "others": 2, "same_from_cosine": 0.7, "recurs": SHARES}
    (tmp_path / "stability.json").write_text(json.dumps({toy.HOOK: entry}))
    home = visit(page.write(tmp_path).as_uri())
    assert home.locator(f".row[data-latent='{toy.DENSE}'] .badge.seeds").inner_text() == "2/2"
    assert home.locator(f".row[data-latent='{toy.DEAD}'] .badge.seeds").count() == 0
    home.click("#filters")
    home.click("[data-state=stable]")
    wait_for(home, [2, 4])
    home.click("[data-state=stable]")
    home.click("[data-state=unique]")
    wait_for(home, [3, 6])
    home.click("[data-state=unique]")
    home.select_option("#sort", "recurs")
    wait_for(home, [2, 4, 0, 5, 7, 3, 6, 1])
    home.click(f".row[data-latent='{toy.ORDINARY}']")
    home.wait_for_selector(f"article[data-latent='{toy.ORDINARY}']")
    assert "1/2" in home.locator(".facts").inner_text()


def test_without_a_comparison_there_is_none_of_it(visit, tmp_path):
    toy.write_store(tmp_path)
    home = visit(page.write(tmp_path).as_uri())
    assert shown(home) == list(range(toy.D_SAE))
    home.click("#filters")
    assert home.locator("[data-state=stable]").count() == 0
    assert home.locator("#sort-recurs").is_hidden()
    assert home.locator(".badge.seeds").count() == 0
