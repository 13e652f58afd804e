"""The explorer of a crosscoder over checkpoints, in a real Chromium: orders, timelines, and the film."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import explorer_toy as toy
import pytest
from chromium import PHONE, assert_fits, shown, wait_for

from bridge.explorer import page
from bridge.run import Run
from jsae.records.store import StoreError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The toy run as the last of three checkpoints of a crosscoder."""
    run = tmp_path_factory.mktemp("runs") / "stages"
    toy.write_store(run, stage="sft")
    toy.write_stages(run)
    toy.write_origin(run, toy.SPLIT)
    page.write(run)
    return run


@pytest.fixture
def home(visit, run) -> Any:
    return visit((run / "explorer" / "index.html").as_uri())


def option(home: Any, name: str) -> None:
    home.select_option("#sort", label=name)


def test_the_list_sorts_by_what_became_of_latents(home):
    option(home, "Appeared at")
    wait_for(home, [toy.ORDINARY, toy.DENSE, toy.SPLIT, toy.ONCE, toy.HOSTILE, toy.BLANKS, toy.EMPTY, toy.DEAD])
    option(home, "Lost in sft")
    wait_for(
        home, [toy.SPLIT, toy.HOSTILE, *sorted((toy.ORDINARY, toy.ONCE, toy.DENSE, toy.EMPTY, toy.BLANKS)), toy.DEAD]
    )
    option(home, "Gained in sft")
    wait_for(
        home,
        [toy.BLANKS, toy.EMPTY, toy.DENSE, *sorted((toy.ORDINARY, toy.HOSTILE, toy.SPLIT, toy.ONCE)), toy.DEAD],
    )
    option(home, "Changed most in sft")  # ONCE turns: the distance of two unit vectors with a cosine of 0.2
    wait_for(home, [toy.ONCE, toy.BLANKS, toy.SPLIT, toy.EMPTY, toy.DENSE, toy.HOSTILE, toy.ORDINARY, toy.DEAD])
    assert home.locator(f".row[data-latent='{toy.BLANKS}'] .badge.since").inner_text() == "sft"
    assert home.locator(f".row[data-latent='{toy.ORDINARY}'] .badge.since").count() == 0


def test_the_list_filters_by_kind(home):
    home.click("#filters")
    home.click("[data-state=exclusive]")
    wait_for(home, [toy.HOSTILE, toy.BLANKS, toy.SPLIT])
    home.click("[data-state=exclusive]")
    home.click("[data-state=rotated]")
    wait_for(home, [toy.ONCE])


def test_a_latent_has_its_timeline(home):
    home.click(f".row[data-latent='{toy.SPLIT}']")
    card = home.locator(".timeline")
    card.wait_for()
    assert "there from step-10 · dies at sft" in card.inner_text()
    said = [chart.get_attribute("aria-label") for chart in card.locator("svg").all()]
    assert said == [
        "Norm: step-10 100 %, step-100 100 %, sft 0 %",
        "Density: step-10 10 %, step-100 10 %, sft 0 %",
        "Cosine: step-10 1.00, step-100 1.00, sft 0.10",
        "Loss: step-10 4.00 nats, step-100 4.00 nats, sft 5.00 nats",
    ]
    card.locator(".over").nth(2).hover()
    assert home.locator("#tip").inner_text().split() == ["sft", "norm", "0", "%"]


def test_a_dead_latent_has_a_timeline_without_a_loss(home):
    home.click(f".row[data-latent='{toy.DEAD}']")
    card = home.locator(".timeline")
    card.wait_for()
    assert "fires too rarely to say" in card.inner_text()
    assert card.locator("svg").count() == 3


def test_a_latent_says_where_it_comes_from(home):
    home.click(f".row[data-latent='{toy.SPLIT}']")
    card = home.locator(".origins")
    card.wait_for()
    said = card.inner_text()
    assert "grew most from step-10 to step-100" in said
    assert "Of the text in between: row group 3 of <b>shard.parquet. Read were 4,000 tokens of 40 documents" in said
    assert "falls from 6.50 to 2.25 nats where it fires, and from 5.00 to 4.50 elsewhere." in said
    documents, files, learned, occurrences = card.locator(":scope > div").all()
    assert "<b>shard.parquet row group 3 · document 0" in documents.inner_text()
    assert "<script>alert(1)</script> sat↵ cat on" in documents.inner_text()
    assert documents.locator(":scope > table tr").count() == 5
    assert documents.locator("summary").inner_text() == "5 more"  # the page has ten of the twelve
    assert files.locator("td").all_inner_texts() == ["<b>shard.parquet row group 3", "5 % of 100 tokens", "12.5"]
    assert "<i> on" in learned.inner_text()
    assert "3 times" in learned.inner_text()
    assert "7.50 → 0.50" in occurrences.inner_text()


def test_a_latent_that_was_not_traced_says_nothing_of_it(home):
    home.click(f".row[data-latent='{toy.ORDINARY}']")
    home.locator(".timeline").wait_for()
    assert home.locator(".origins").count() == 0


def test_the_film_moves_and_says_what_happens(home):
    home.click("text=Film")
    home.wait_for_selector("#film")
    assert home.locator("#stage").inner_text() == "sft"
    assert [tile.inner_text() for tile in home.locator(".tile b").all()] == ["6", "2", "1", "4.50"]
    picked = [box.inner_text() for box in home.locator(".picks").all()]
    assert f"#{toy.BLANKS}" in picked[0]
    assert f"#{toy.ONCE}" in picked[1]
    assert f"#{toy.SPLIT}" in picked[2]
    home.fill("#film", "0")
    home.wait_for_function("() => document.querySelector('#stage').textContent === 'step-10'")
    assert home.locator(".tile b").first.inner_text() == "4"
    home.click("#play")
    assert home.locator("#play").inner_text() == "Pause"
    home.wait_for_function("() => document.querySelector('#play').textContent === 'Play'")
    assert home.locator("#stage").inner_text() == "sft"


def pixels(home: Any) -> str:
    return home.evaluate("() => document.querySelector('.film canvas').toDataURL()")


def test_the_map_shows_another_picture_in_another_checkpoint(home):
    home.click("text=Film")
    home.wait_for_function("() => document.querySelector('.film canvas')?.width > 300")
    last = pixels(home)
    home.emulate_media(reduced_motion="reduce")
    home.fill("#film", "0")
    home.wait_for_function("(last) => document.querySelector('.film canvas').toDataURL() !== last", arg=last)


@pytest.mark.parametrize("where", ["#view=film", f"#latent={toy.SPLIT}"])
def test_it_fits_on_a_phone(visit, run, where):
    home = visit(f"{(run / 'explorer' / 'index.html').as_uri()}{where}", wait=".origins, .film canvas", viewport=PHONE)
    assert_fits(home)


def test_without_checkpoints_there_is_none_of_it(visit, tmp_path):
    toy.write_store(tmp_path)
    home = visit(page.write(tmp_path).as_uri())
    assert shown(home) == list(range(toy.D_SAE))
    assert home.locator(".of-stages, .badge.since").count() == 0
    assert home.locator("#tabs a[data-view=film]").count() == 0


# ---- files of others ------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> Path:
    toy.write_store(tmp_path, stage="sft")
    toy.write_stages(tmp_path)
    return tmp_path


def test_records_of_a_checkpoint_are_checked_against_its_own_sae(files):
    assert Run(files).records(toy.HOOK).header.settings["stage"] == "sft"
    file = files / "stages" / "sft" / toy.HOOK / "cfg.json"
    file.write_text(re.sub(r'"k": 2', '"k": 3', file.read_text()))
    with pytest.raises(StoreError, match="it was trained again"):
        Run(files).records(toy.HOOK)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kinds": ["shared"]}, r"shape \(8, 3\), expected \(1, 3\)"),
        ({"events": [{"latent": 8, "kind": "dies", "stage": "sft"}]}, "latents that do not exist"),
        ({"events": [{"latent": 1, "kind": "dies", "stage": "rl"}]}, "KeyError"),
        ({"checkpoints": {}}, "expected"),
        ({"latents": {"final": [["a"]]}}, "KeyError"),
    ],
)
def test_a_broken_comparison_is_refused_with_the_command_that_writes_it(files, change, said):
    table = toy.write_stages(files) | change
    (files / "stages.json").write_text(json.dumps({toy.HOOK: table}))
    with pytest.raises(ValueError, match=rf"stages.json is broken at .*experiments.diff.*{said}"):
        page.write(files)


def test_broken_losses_are_refused_with_the_command_that_writes_them(files):
    Run(files).losses_file(toy.HOOK).write_text(json.dumps({"everywhere": [1.0], "latents": []}))
    with pytest.raises(ValueError, match=r"losses.json is broken, .*--force"):
        page.write(files)


def test_a_comparison_of_an_earlier_version_is_not_shown(files):
    table = toy.write_stages(files)
    del table["revision"]
    (files / "stages.json").write_text(json.dumps({toy.HOOK: table}))
    page.write(files)
    assert not list(files.glob("explorer/page-*/timeline-*.js"))


@pytest.mark.parametrize(
    "change", [{"grew": 3}, {"documents": [{}]}, {"loss": {}}, {"fired": "many"}, {"tokens": [{"token": "x"}]}]
)
def test_a_broken_origin_is_refused_with_the_command_that_writes_it(files, change):
    origin = toy.write_origin(files, toy.ONCE) | change
    file = Run(files).provenance_file(toy.HOOK, toy.ONCE)
    file.write_text(json.dumps(origin))
    with pytest.raises(ValueError, match=rf"{file.name} is broken, .*experiments.provenance .*--latent={toy.ONCE}"):
        page.write(files)


def test_an_origin_in_an_earlier_crosscoder_is_not_shown(files, capsys):
    shutil.copytree(files / "stages" / "sft" / toy.HOOK, files / "sae" / toy.HOOK)
    toy.write_origin(files, toy.ONCE)
    page.write(files)
    assert not list(files.glob("explorer/page-*/origins-*.js"))
    assert "is of an earlier crosscoder, and is not shown" in capsys.readouterr().err
