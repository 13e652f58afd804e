"""The live explorer of a crosscoder over checkpoints: a real run, its real server, two checkpoints side by side."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import explorer_toy
import httpx
import numpy as np
import pytest
import stage_files
import torch
from chromium import PHONE, assert_fits, wait_for_address
from live_explorer import serving

import bridge.nanochat
from bridge.exploration import Extent, explore, of_run
from bridge.hooks import capture, hook_name
from bridge.nanochat.loss import losses_of
from bridge.run import Run, timelines
from bridge.runtime import InterpretableModel, Steer
from bridge.torch_sae import load
from bridge.training import train
from jsae.records.store import digest
from jsae.settings import ConfigError

HOOK = hook_name(1, "resid_post")
TRACED = 40
STAGES = ["d4-100", "d4-200", "sft"]
TEXT = "def read(self):\n    return self"
SETTINGS: dict[str, Any] = {
    "layer": (1,),
    "activation": "batchtopk",
    "k": 8,
    "expansion_factor": 4,
    "num_activations": 20_000,
    "batch_size": 512,
    "block_size": 8192,
    "heldout_tokens": 2_000,
    "context_size": 64,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A trained crosscoder over three checkpoints."""
    root = stage_files.write_series(tmp_path_factory.mktemp("nanochat"))
    text = tmp_path_factory.mktemp("text")
    for number, file in enumerate(sorted(Path(json.__file__).parents[1].glob("*.py"))[:12]):
        shutil.copy(file, text / f"{number}.txt")
    folder = tmp_path_factory.mktemp("runs") / "stages"
    return train(checkpoints=stage_files.flag(root), data=f"{text}/*.txt", output_dir=str(folder), **SETTINGS)


@pytest.fixture(scope="module")
def live(run) -> Iterator[str]:
    """The address of a real `experiments.explore --serve` on the run, one of whose latents was traced."""
    explorer_toy.write_origin(run.path, TRACED, HOOK, digest(run.sae_folder(HOOK)))
    with serving(run.path, "--num_tokens=4000") as url:
        yield url


def asked(live: str, path: str, **body: object) -> httpx.Response:
    with httpx.Client(base_url=live, timeout=60, trust_env=False) as client:
        return client.post(path, json=body)


def test_the_records_are_of_the_last_checkpoint_and_its_own_sae(live, run):
    store = run.records(HOOK)
    assert store.header.settings["stage"] == "sft"
    nano = bridge.nanochat.load(Path(run.facts["checkpoints"][2]["path"]))
    assert store.texts.header.fingerprint == nano.fingerprint
    assert timelines.read(run.path, HOOK).names == STAGES


def test_losses_are_those_of_every_checkpoint_where_latents_fire(live, run):
    store, table = run.records(HOOK), json.loads(run.losses_file(HOOK).read_text())
    tokens = torch.from_numpy(np.asarray(store.texts.tokens).astype(np.int64))
    latent = int(np.argmax(store["count"]))
    cells, _ = store.all.activations_of_latent(latent)
    inside = ~np.isin(tokens[:, 1:].numpy(), store.texts.header.special)
    for number, record in enumerate(run.facts["checkpoints"]):
        model = bridge.nanochat.load(record["path"], record["step"]).model
        with torch.no_grad():
            losses = losses_of(model(tokens)[:, :-1], tokens[:, 1:]).double().numpy()
        assert table["everywhere"][number] == pytest.approx(losses[inside].mean(), abs=1e-3)
        padded = np.pad(np.where(inside, losses, np.nan), ((0, 0), (0, 1)), constant_values=np.nan)
        assert table["latents"][latent][number] == pytest.approx(np.nanmean(padded.reshape(-1)[cells]), abs=1e-3)


def test_a_latent_that_was_traced_says_where_it_comes_from(visit, live):
    tab = visit(f"{live}#latent={TRACED}", wait=".origins")
    assert "row group 3 · document 0" in tab.locator(".origins").inner_text()


def test_a_text_is_read_by_two_checkpoints(live, run):
    reply = asked(live, "api/compare", text=TEXT, first="d4-100", second="sft").json()
    for side, name in zip(reply["sides"], ("d4-100", "sft"), strict=True):
        record = run.facts["checkpoints"][STAGES.index(name)]
        nano = bridge.nanochat.load(record["path"], record["step"])
        tokens = torch.tensor([nano.tokenizer.encode(TEXT, prepend_bos=True)])
        with torch.no_grad(), capture(nano.model, [HOOK]) as acts:
            logits = nano.model(tokens)
        expected = load(run.stage_folder(name, HOOK)).encode(acts[HOOK][0])
        for row, features in zip(expected[1:], side["features"], strict=True):
            top = row.topk(8)
            assert [f["value"] for f in features] == pytest.approx([v for v in top.values.tolist() if v > 0], rel=1e-4)
        losses = losses_of(logits[:, :-1], tokens[:, 1:])[0]
        assert side["losses"] == pytest.approx(losses.tolist(), abs=1e-3)
        side["codes"] = expected
    difference = (reply["sides"][0]["codes"] - reply["sides"][1]["codes"])[1:].abs()
    first = reply["differ"][0]
    assert abs(first["first"] - first["second"]) == pytest.approx(float(difference.max()), rel=1e-4)
    assert float(difference[first["position"], first["index"]]) == pytest.approx(float(difference.max()), rel=1e-4)


def test_the_same_checkpoint_twice_does_not_differ(live):
    assert asked(live, "api/compare", text=TEXT, first="sft", second="sft").json()["differ"] == []


def test_directions_of_another_checkpoint_are_pushed(live, run):
    def features(**more: object) -> list[float]:
        """The activations of the pushed latent on the tokens of a continuation."""
        steer = [{"hook": HOOK, "index": 40, "mode": "additive", "strength": 30}]
        reply = asked(live, "api/steer", prompt="def", steer=steer, temperature=0, max_tokens=6, **more)
        lines = [json.loads(line) for line in reply.text.splitlines()]
        pushed = [line["features"][HOOK] for line in lines if line.get("which") == "steered" and "features" in line]
        return [{f["index"]: f["value"] for f in some}.get(40, 0.0) for some in pushed]

    nano = bridge.nanochat.load(Path(run.facts["checkpoints"][2]["path"]))
    im = InterpretableModel(nano.model, {HOOK: load(run.stage_folder("d4-100", HOOK))}, nano.tokenizer)
    tokens = im.generate("def", [Steer(HOOK, 40, strength=30)], temperature=0, max_tokens=6, features=10)
    expected = [dict(token.features[HOOK]).get(40, 0.0) for token in tokens]
    assert features(directions_of="d4-100") == pytest.approx(expected, rel=1e-4)
    assert features(directions_of="sft") == features() != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("compare", {"text": TEXT, "first": "none", "second": "sft"}, "one of d4-100, d4-200, sft"),
        ("compare", {"text": TEXT, "first": "sft"}, "second"),
        ("compare", {"text": TEXT, "first": "sft", "second": "sft", "top_k": 99}, "top_k"),
        ("steer", {"prompt": "a", "directions_of": "../sae"}, "one of d4-100, d4-200, sft"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(live, path, body, said):
    reply = asked(live, f"api/{path}", **body)
    assert reply.status_code == 400
    assert said in reply.json()["error"]


def test_the_page_compares_and_steers(visit, live):
    tab = visit(f"{live}#view=checkpoints", wait="#compared")
    assert tab.locator("#tabs a:visible").all_inner_texts() == [
        "Latents",
        "Film",
        "Your text",
        "Checkpoints",
        "Lenses",
        "Steer",
        "Lists",
    ]
    tab.select_option("#first", "d4-100")
    tab.fill("#compared", TEXT)
    tab.wait_for_selector(".differ tbody tr")
    assert tab.locator(".sheets h2").first.inner_text().startswith("d4-100")
    assert "nats per token" in tab.locator(".sheets h2").last.inner_text()
    tab.locator(".differ .other").first.hover()
    assert tab.locator(".sheets .hot").count() > 0
    tab.goto(f"{live}#view=steer")
    assert tab.locator("#directions").input_value() == "sft"
    tab.select_option("#directions", "d4-100")
    with tab.expect_request("**/api/steer") as sent:
        tab.fill("#prompt", "def")
        tab.click("#go")
    assert sent.value.post_data_json["directions_of"] == "d4-100"


def test_a_link_shows_the_same_checkpoints_and_directions(visit, live):
    tab = visit(f"{live}#view=checkpoints", wait="#compared")
    tab.select_option("#first", "sft")
    tab.select_option("#second", "d4-100")
    tab.fill("#compared", TEXT)
    wait_for_address(tab, "first=sft", "second=d4-100", "text=")
    other = visit(tab.url, wait=".differ tbody tr")
    assert [other.locator(name).input_value() for name in ("#first", "#second", "#compared")] == ["sft", "d4-100", TEXT]
    tab.goto(f"{live}#view=steer")
    tab.select_option("#directions", "d4-100")
    wait_for_address(tab, "directions=d4-100")
    again = visit(tab.url, wait="#directions")
    assert again.locator("#directions").input_value() == "d4-100"
    unknown = visit(f"{live}#view=checkpoints&first=none", wait="#compared")
    assert unknown.locator("#first").input_value() == "d4-200"


def test_comparing_fits_on_a_phone(visit, live):
    tab = visit(f"{live}#view=checkpoints", wait="#compared", viewport=PHONE)
    tab.fill("#compared", TEXT)
    tab.wait_for_selector(".differ tbody tr")
    assert_fits(tab)


# ---- another checkpoint, and what is refused -----------------------------------------------------------------------


def test_another_checkpoint_is_explored_by_its_name(live, run, tmp_path, capsys):
    copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
    explored = explore(of_run(copy), Extent(num_tokens=2_000, stage="d4-100", models_in_memory="one"))
    assert copy.records(HOOK).header.settings["stage"] == "d4-100"
    assert explored.checkpoints.chosen == "d4-100"
    assert explored.nano.fingerprint == run.facts["checkpoints"][0]["fingerprint"]
    assert "the records of blocks.1.hook_resid_post are of checkpoint sft" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--stage=rl: .* is on d4-100, d4-200, sft"):
        explore(of_run(copy), Extent(stage="rl"))
    shutil.rmtree(copy.stage_folder("d4-200", HOOK))
    with pytest.raises(ConfigError, match="d4-200 has no SAE of its own"):
        explore(of_run(copy), Extent(stage="d4-200"))
