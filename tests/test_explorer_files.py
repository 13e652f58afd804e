"""The files of the explorer's page: reproducible, small, and usable with very many latents."""

import json
from pathlib import Path

import explorer_toy as toy
import numpy as np
import pytest
from chromium import open_latent, wait_for

from bridge.explorer import page
from bridge.run import labels
from jsae.records.store import COLUMNS, VERSION, Header, Store, StoreError, Texts, TextsHeader

OTHER = "blocks.1.hook_mlp_out"


def files(run: Path) -> dict[str, bytes]:
    """The files of the page by their place in explorer/."""
    found = (path for path in (run / "explorer").rglob("*") if path.suffix in (".js", ".html", ".css"))
    return {str(path.relative_to(run / "explorer")): path.read_bytes() for path in found}


def names(run: Path) -> list[str]:
    """The names of the files of the folder that index.html shows."""
    (folder,) = {name.partition("/")[0] for name in files(run)} - {"index.html", "graphs"}
    assert f'src="{folder}/core.js"' in (run / "explorer" / "index.html").read_text()
    return sorted(path.name for path in (run / "explorer" / folder).iterdir())


def write_toy(run: Path) -> None:
    toy.write_store(run)
    toy.write_store(run, OTHER, seed=1)
    labels.append(run, toy.HOOK, toy.SPLIT, "é in two halves", "seen <b>once</b>")
    page.write(run)


def test_the_same_records_give_the_same_bytes_and_leave_nothing_of_others(tmp_path):
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    write_toy(one)
    (other / "explorer").mkdir(parents=True)
    for name in ("shard-0-77.js", "list-9.js", "texts-3.js", "core.js", "explorer.css"):
        (other / "explorer" / name).write_text("left from a larger run")
    write_toy(other)
    assert files(one) == files(other)
    before = {path: path.stat().st_mtime_ns for path in (one / "explorer").rglob("*.*")}
    page.write(one)
    assert before == {path: path.stat().st_mtime_ns for path in (one / "explorer").rglob("*.*")}


def test_a_page_that_was_damaged_is_written_again(tmp_path):
    toy.write_store(tmp_path)
    whole = files(page.write(tmp_path).parents[1])
    (shard,) = (tmp_path / "explorer").glob("page-*/shard-0-0.js")
    shard.write_text("jsae.put(")
    page.write(tmp_path)
    assert files(tmp_path) == whole


def test_a_page_that_is_open_while_another_is_written_says_so(visit, tmp_path):
    """No mixture of two pages is shown: what the page has not loaded yet is gone."""
    write_large(tmp_path, latents=200, rows=200, length=64, each=2)
    tab = visit(page.write(tmp_path).as_uri() + "#latent=1", expected="ERR_FILE_NOT_FOUND")
    open_latent(tab, 1)
    (tmp_path / "labels.json").write_text(json.dumps({toy.HOOK: {"0": {"label": "new"}}}))
    page.write(tmp_path)
    tab.evaluate("location.hash = '#latent=150'")
    assert "reload this page" in tab.wait_for_selector("[role=alert]").inner_text()
    tab.reload()
    open_latent(tab, 150)


def test_one_hook_of_several_can_be_shown(tmp_path):
    toy.write_store(tmp_path)
    toy.write_store(tmp_path, OTHER, seed=1)
    page.write(tmp_path, [OTHER])
    assert [name for name in names(tmp_path) if name.startswith("list-")] == ["list-0.js"]


def test_records_of_another_sae_and_a_run_without_records_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"experiments\.explore"):
        page.write(tmp_path)
    toy.write_store(tmp_path)
    weights = tmp_path / "sae" / toy.HOOK / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(StoreError, match="gather the records again"):
        page.write(tmp_path)
    assert not (tmp_path / "explorer" / "index.html").exists()


def test_five_hundred_latents_take_less_than_ten_megabytes(tmp_path):
    write_large(tmp_path, latents=500, rows=8000, length=256)
    page.write(tmp_path)
    assert sum(map(len, files(tmp_path).values())) < 10e6
    (manifest,) = (content for name, content in files(tmp_path).items() if name.endswith("/manifest.js"))
    manifest = json.loads(manifest.decode().partition(",")[2].rpartition(")")[0])
    assert manifest["radius"] >= 32


def test_a_long_list_draws_only_visible_rows(visit, tmp_path):
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
