"""The live explorer of a run of transcoders, which traces prompts, reads latents and does not steer."""

from collections.abc import Iterator

import httpx
import pytest
from live_explorer import ROOT, C, serving
from toy_saes import export, toy_transcoder

import bridge.nanochat
from bridge.circuits import graph_check
from bridge.run import directory as rundir
from experiments.train import RunConfig

LAYERS = 6
PROMPT = "for <b>x</b> in é"


@pytest.fixture(scope="module")
def live(browser, tmp_path_factory) -> Iterator[str]:
    """The address of a real `experiments.explore --serve` on the demo with transcoders of all layers."""
    folder = tmp_path_factory.mktemp("tracing")
    run = folder / "runs" / "transcoders"
    fingerprint = bridge.nanochat.load("demo").fingerprint
    for layer in range(LAYERS):
        sae = toy_transcoder(layer, C, 96, model_fingerprint=fingerprint)
        export(sae, run / "sae" / sae.metadata["hook_name"])
    text = folder / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "jsae").glob("*.py"))[:4]))
    settings = {"layer": ("all",), "hook_type": "mlp_in", "target_hook": "mlp", "skip": True}
    rundir.record(run, RunConfig(checkpoint="demo", data=str(text), **settings), {"model": fingerprint})
    with serving(run, "--num_tokens=4000") as url:
        yield url


def asked(live: str, **body: object) -> httpx.Response:
    with httpx.Client(base_url=live, timeout=60, trust_env=False) as client:
        return client.post("api/graph", json=body)


def test_a_typed_prompt_is_traced_and_a_reload_shows_the_same(visit, live):
    tab = visit(f"{live}#view=graph", wait="#tracedprompt")
    assert tab.locator("#tabs a:visible").all_inner_texts() == ["Latents", "Your text", "Lenses", "Lists", "Graphs"]
    tab.fill("#tracedprompt", PROMPT)
    tab.click("#trace")
    tab.wait_for_selector(".picture .node")
    tab.locator("#prunenodes").fill("1")  # random transcoders explain little
    assert "<b>" in tab.inner_text(".asked").replace("\n", "")
    tab.locator(".picture .node.feature").first.click()
    label = tab.inner_text("#node")
    tab.wait_for_selector(".texts-of .kwic")
    tab.wait_for_timeout(300)  # until the address is written
    tab.reload()
    tab.wait_for_selector("#node")
    assert tab.inner_text("#node") == label
    assert tab.input_value("#tracedprompt") == PROMPT
    tab.click("#rename")
    tab.fill("#label", "my <i>name</i>")
    tab.click("#keep")
    tab.locator("#node", has_text="my <i>name</i>").wait_for()


def test_a_graph_is_a_file_that_other_pages_show_and_names_its_transcoders(live):
    document = asked(live, prompt=PROMPT).json()
    graph_check.check(document)
    assert len(document["metadata"]["sae_sha256"]) == LAYERS
    assert document["metadata"]["prompt"] == PROMPT
    assert document == asked(live, prompt=PROMPT, measure="logit").json()
    assert document["links"] != asked(live, prompt=PROMPT, measure="logprob").json()["links"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({}, 400, "prompt is missing"),
        ({"prompt": ""}, 400, "the text is empty"),
        ({"prompt": 3}, 400, "prompt is 3: expected a text"),
        ({"prompt": "a " * 400}, 422, "this server traces at most 128"),
        ({"prompt": "x" * 10**6}, 400, "bytes: at most"),
        ({"prompt": "a", "measure": "loss"}, 400, "one of logit, logprob"),
        ({"prompt": "a", "nodes": 3}, 400, '"nodes" is not a field'),
    ],
)
def test_requests_that_cannot_be_traced_are_refused_in_one_line(live, body, status, told):
    answer = asked(live, **body)
    assert answer.status_code == status
    assert told in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_prompt_that_is_too_long_leaves_the_graph_and_says_so(visit, live):
    tab = visit(f"{live}#view=graph&prompt=def", wait=".picture .node", expected="422")
    tab.fill("#tracedprompt", "a " * 400)
    tab.click("#trace")
    tab.wait_for_selector("#graphstatus [role=alert]")
    assert "traces at most 128" in tab.inner_text("#graphstatus")
    assert tab.locator(".picture .node").count() > 3


def test_latents_of_transcoders_are_read_but_not_steered(visit, live):
    tab = visit(f"{live}#latent=0")
    tab.wait_for_selector(".latent")
    assert tab.locator("#push").count() == 0
    assert tab.locator("#rename").count() == 1
    tab.goto(f"{live}#view=overview")
    tab.wait_for_selector(".overview")
    assert "JumpReLU skip transcoder that reads blocks.0.ln2.hook_normalized" in tab.inner_text(".overview header")
    steer = {"hook": "blocks.0.ln2.hook_normalized", "index": 0, "strength": 1}
    with httpx.Client(base_url=live, timeout=60, trust_env=False) as client:
        answer = client.post("api/steer", json={"prompt": "a", "steer": [steer]})
    assert answer.status_code == 400
    assert "is a transcoder" in answer.json()["error"]
