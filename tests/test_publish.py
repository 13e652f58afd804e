"""Uploading to Neuronpedia: every feature once, whatever the site and the user do to it."""

import json
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import neuronpedia_site as behave
import pytest
from explorer_toy import DEAD, HOOK, write_store
from neuronpedia_site import KEY, Site, serving

from bridge.neuronpedia import payload
from bridge.neuronpedia.client import ApiError, Client, Explanation, Patience, RefusedError
from bridge.neuronpedia.ids import Ids
from bridge.neuronpedia.ledger import Ledger, LedgerError
from bridge.neuronpedia.payload import PayloadError, Target
from bridge.neuronpedia.upload import NeuronpediaUploader, Progress
from jsae import extras
from jsae.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
IDS = Ids("nanochat-toy", "res-1k", "toy", "blocks.1.hook_resid_post")
TARGET = Target(IDS, layers=2, description="Residual Stream - 1k")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """No proxy of the environment stands between the tests and their site."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def site():
    with serving() as found:
        yield found


def feature(index: int, texts: int = 2, **other) -> dict:
    acts = [{"tokens": [" the", f" cat{i}"], "values": [0.0, 1.5 + i], "quantileMax": None} for i in range(texts)]
    logits = [{"token": " a", "value": 0.5}]
    return {"index": index, "density": 0.01, "topLogits": logits, "explanations": [], "activations": acts} | other


class Waits(list):
    """Stands for sleeping; a list of how long."""

    def client(self, site: Site, key: str | None = KEY, **patience) -> Client:
        return Client(key, site.url, Patience(**patience), sleep=self.append, jitter=lambda: 0.0)


def prepared(folder: Path, features: list[dict], each: int = 4):
    return NeuronpediaUploader(TARGET).prepare_sae_for_upload(features, folder / "bodies", max_features=each)


def upload(site: Site, folder: Path, features: list[dict], client: Client | None = None, **other) -> Progress:
    plan = prepared(folder, features)
    key = (site.url, IDS.model, IDS.source)
    with client or Waits().client(site) as client, Ledger(folder / "ledger.jsonl", key) as ledger:
        return NeuronpediaUploader(TARGET).upload(plan, client, ledger, **other)


def counts(site: Site) -> dict[int, int]:
    return {
        index: n for (model, source, index), n in site.activations.items() if (model, source) == (IDS.model, IDS.source)
    }


# ---- what is sent -------------------------------------------------------------------------------------------------


def test_all_features_arrive_once_after_model_and_source_set_were_made(site, tmp_path):
    heard = []
    features = [feature(i, explanations=[{"text": "cats"}]) for i in range(10)]
    done = upload(site, tmp_path, features, report=heard.append)
    assert counts(site) == dict.fromkeys(range(10), 1)
    assert site.models == {IDS.model: 2}
    assert site.source_sets == {(IDS.model, "res-1k"): ["0-res-1k", "1-res-1k"]}
    assert [progress.features for progress in heard] == [4, 8, 10]
    assert (done.features, done.total) == (10, 10)
    assert site.stored[IDS.model, IDS.source, 3]["activations"][1]["values"] == [0.0, 2.5]
    assert not [path for method, path in site.requests if method == "GET" and "/feature/" in path]


def test_bodies_keep_to_bytes_and_count_and_are_the_same_every_time(tmp_path):
    features = [feature(i, texts=1 + i % 7) for i in range(40)]
    plan = payload.prepare(features, TARGET, tmp_path / "a", max_features=5, max_bytes=1600)
    bodies = [(tmp_path / "a" / batch.file).read_bytes() for batch in plan.batches]
    assert max(map(len, bodies)) <= 1600
    assert [len(body) for body in bodies] == [batch.size for batch in plan.batches]
    told = [json.loads(body) for body in bodies]
    assert [f["index"] for body in told for f in body["features"]] == list(range(40))
    assert all(
        {k: body[k] for k in ("modelId", "source")} == {"modelId": IDS.model, "source": "1-res-1k"} for body in told
    )
    assert max(len(body["features"]) for body in told) == 5
    assert min(len(body["features"]) for body in told[:-1]) < 5
    again = payload.prepare(features, TARGET, tmp_path / "a", max_features=5, max_bytes=1600)
    assert again == plan
    payload.prepare(features[:3], TARGET, tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["batch-0.json", "plan.json"]


def test_dead_features_are_left_out_and_counted(tmp_path):
    plan = prepared(tmp_path, [feature(0), feature(1, texts=0)])
    assert (plan.features, plan.dead) == (1, 1)
    with pytest.raises(PayloadError, match="all features are dead"):
        prepared(tmp_path, [feature(1, texts=0)])


def act(**other) -> dict:
    return {"activations": [{"tokens": ["a"], "values": [1.0]} | other]}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"index": 10_000_001}, "expected 0 to 10,000,000"),
        ({"index": "3"}, "expected 0 to 10,000,000"),
        ({"density": 1.5}, "density is 1.5"),
        ({"density": float("nan")}, "density is nan"),
        ({"colour": "red"}, "unknown colour"),
        ({"topLogits": [{"token": "a", "value": 1.0}] * 21}, "21 tokens, Neuronpedia accepts at most 20"),
        ({"bottomLogits": [{"token": "", "value": 1.0}]}, "a token is empty"),
        ({"bottomLogits": [{"token": "a", "value": float("inf")}]}, "inf is not a finite number"),
        ({"explanations": [{"text": ""}]}, "the text is empty"),
        ({"explanations": [{"text": "😀" * 257}]}, "514 characters"),
        ({"explanations": [{"text": "a", "methodName": 3}]}, "methodName is 3"),
        (act(tokens=["a", "b"]), "2 tokens but 1 values"),
        (act(tokens=["a"] * 1025, values=[1.0] * 1025), "1025 tokens"),
        (act(tokens=[]), "0 tokens but 1 values"),
        (act(tokens=[""]), "token 0 is empty, which Neuronpedia refuses"),
        (act(tokens=["\0"]), "token 0 contains NUL"),
        (act(tokens=["\ud800"]), "half of a surrogate pair"),
        (act(values=[float("nan")]), "value 0 is nan"),
        (act(values=[True]), "value 0 is True"),
        (act(quantileFraction=-1), "quantileFraction is -1: give a share, or null"),
        (act(quantileMax=1e8), "quantileMax is 1"),
    ],
)
def test_what_the_site_would_refuse_is_said_before_anything_is_sent(tmp_path, other, said):
    with pytest.raises(PayloadError, match=said):
        prepared(tmp_path, [feature(0), feature(7) | other])
    assert not (tmp_path / "bodies" / "plan.json").exists()


def test_duplicate_features_and_features_too_large_for_a_request_are_refused(tmp_path):
    with pytest.raises(PayloadError, match="feature 5 occurs twice"):
        prepared(tmp_path, [feature(5), feature(5)])
    with pytest.raises(PayloadError, match=r"feature 5 alone has 2,\d+ bytes of JSON; a request may have 1,000"):
        payload.prepare([feature(5, texts=30)], TARGET, tmp_path, max_bytes=1000)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"layers": 128}, "accepts 1 to 127"),
        ({"layers": 1}, "layer 1 is not one of the model's 1"),
        ({"description": "x" * 129}, "accepts 1 to 128 characters"),
        ({"display_name": ""}, "accepts 1 to 64 characters"),
        ({"url": "javascript:alert(1)"}, "give a full address"),
        ({"ids": Ids("nanochat-toy", "res", "toy", HOOK, suffix="l0-4")}, "cannot create the suffix"),
    ],
)
def test_names_that_the_site_would_refuse_are_refused(other, said):
    with pytest.raises(PayloadError, match=said):
        Target(**({"ids": IDS, "layers": 3} | other))
    with pytest.raises(ConfigError, match="the model id 'GPT' would be refused"):
        Ids("GPT", "res", "toy", HOOK)


# ---- what goes wrong ----------------------------------------------------------------------------------------------

FAULTS = [
    behave.drop_before,
    behave.drop_after,
    behave.half,
    behave.fail_before,
    behave.fail_after,
    behave.limited,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("null_for_missing", [False, True])
def test_after_any_failure_every_feature_is_there_once(site, tmp_path, fault, null_for_missing):
    site.faults = [None, fault, fault, None]
    site.null_for_missing = null_for_missing
    upload(site, tmp_path, [feature(i, explanations=[{"text": "cats"}]) for i in range(10)])
    assert counts(site) == dict.fromkeys(range(10), 1)
    assert all(len(found) == 1 for found in site.explanations.values())


def test_all_failures_one_after_the_other_still_give_every_feature_once(site, tmp_path):
    site.faults = [*FAULTS, *reversed(FAULTS)]
    upload(site, tmp_path, [feature(i) for i in range(23)])
    assert counts(site) == dict.fromkeys(range(23), 1)


def test_what_is_sent_again_is_only_what_is_missing(site, tmp_path):
    site.faults = [behave.half]
    heard = []
    upload(site, tmp_path, [feature(i) for i in range(4)], report=heard.append)
    whole, again = (tmp_path / "bodies" / "batch-0.json").stat().st_size, heard[0].sent
    assert 1.4 * whole < again < 1.6 * whole
    assert len([1 for method, path in site.requests if method == "GET" and "/feature/" in path]) == 4


def test_waits_double_with_jitter_and_what_the_site_asks_for_is_kept(site, tmp_path):
    waits = Waits()
    site.faults = [behave.fail_before] * 3 + [
        behave.limited,
        lambda site, body: (429, {"error": "slow down", "requestWindow": "soon"}),
    ]
    upload(site, tmp_path, [feature(0)], waits.client(site, recheck=0.0))
    assert waits == [4.0, 8.0, 16.0, 3600 / 20, 16.0]

    calm = Client(KEY, site.url, Patience(recheck=0.0), sleep=waits.append, jitter=lambda: 1.0)
    waits.clear()
    site.faults = [behave.fail_before]
    upload(site, tmp_path, [feature(1)], calm)
    assert waits == [2.0]


@pytest.mark.parametrize(
    ("after", "seconds"), [("17", 17.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 2.0), ("tomorrow", 180.0)]
)
def test_retry_after_is_honoured(after, seconds):
    waits = []
    answers = [httpx.Response(429, headers={"retry-after": after}, json=behave.LIMITED), httpx.Response(200, json=[])]
    transport = httpx.MockTransport(lambda _: answers.pop(0))
    with Client(KEY, sleep=waits.append, jitter=lambda: 0.0, transport=transport) as client:
        assert client.request("GET", "/api/x") == []
    assert waits == [seconds]


def test_after_an_unclear_failure_the_site_is_given_time_before_it_is_asked(site, tmp_path):
    waits = Waits()
    site.faults = [behave.drop_after]
    upload(site, tmp_path, [feature(0)], waits.client(site, recheck=33.0))
    assert waits == [33.0]


def test_patience_ends_and_the_same_upload_resumes_later(site, tmp_path):
    features = [feature(i) for i in range(12)]
    site.faults = [None, *[behave.half] * 9]
    with pytest.raises(ApiError, match=r"failed 3 times, the last time: was interrupted .*; try again later"):
        upload(site, tmp_path, features, Waits().client(site, attempts=3))
    assert sum(counts(site).values()) == 7  # of the second batch two, then one of the rest
    site.faults = []
    upload(site, tmp_path, features)
    assert counts(site) == dict.fromkeys(range(12), 1)

    site.faults = [behave.limited] * 100
    waits = Waits()
    with pytest.raises(ApiError, match=r"429 .*Rate limit exceeded.* would exceed the total of 1000 s"):
        upload(site, tmp_path, [feature(99)], waits.client(site, total=1000.0))
    assert sum(waits) <= 1000


def test_an_unreachable_site_is_reported(tmp_path):
    with serving() as gone:
        pass
    with pytest.raises(ApiError, match=r"could not be reached .*; try again later"):
        upload(gone, tmp_path, [feature(0)], Waits().client(gone, attempts=2))


def test_a_refusal_is_reported_at_once(site, tmp_path):
    site.faults = [lambda site, body: (400, {"error": "no\nsuch\x1b[31m thing", "path": "features[0]"})]
    waits = Waits()
    with pytest.raises(RefusedError, match=r"upload-batch was refused: 400 features\[0\]: no such \[31m thing"):
        upload(site, tmp_path, [feature(0)], waits.client(site))
    assert waits == []
    site.faults = [lambda site, body: (308, "")]
    with pytest.raises(RefusedError, match="redirects to"):
        upload(site, tmp_path, [feature(0)])
    site.faults = [lambda site, body: (200, "<html>log in to this network</html>")] * 2
    with pytest.raises(ApiError, match="status 200 without JSON; is this a Neuronpedia"):
        upload(site, tmp_path, [feature(0)], Waits().client(site, attempts=2))


def test_another_site_s_key_is_refused_and_repeated_nowhere(site, tmp_path, caplog):
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(RefusedError, match=r"401 .*not by .key.*check that NEURONPEDIA_API_KEY") as e,
    ):
        upload(site, tmp_path, [feature(0)], Waits().client(site, key="np-secret"))
    told = str(e.value) + caplog.text + "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    assert "secret" not in told


def test_keys_and_addresses_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="would send the API key unencrypted"):
        Client(KEY, "http://np.example")
    with pytest.raises(ValueError, match="invalid characters") as refused:
        Client("np-secret\nx", "https://np.example")
    assert "secret" not in str(refused.value)
    for address in ("np.example", "ftp://np.example", "https://me:hidden@np.example", "https://np.example/?x=1"):
        with pytest.raises(ValueError, match="is not the address of a site") as refused:
            Client(KEY, address)
        assert "hidden" not in str(refused.value)
    with Client(f" {KEY}\n", "https://np.example/api/") as client:
        assert client.base_url == "https://np.example"


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ImportError, match=re.escape(f"httpx is not installed: {extras.advice('neuronpedia')}")):
        Client(KEY)


# ---- going on -----------------------------------------------------------------------------------------------------


def test_a_second_upload_sends_nothing(site, tmp_path):
    features = [feature(i) for i in range(6)]
    upload(site, tmp_path, features)
    before = len(site.requests)
    assert upload(site, tmp_path, features) == Progress(6, 6, 0)
    assert site.requests[before:] == [("GET", "/api/source-set/nanochat-toy/res-1k")]
    upload(site, tmp_path, [*features, feature(6)])
    assert counts(site) == dict.fromkeys(range(7), 1)


def test_other_batches_of_the_same_features_send_nothing_twice(site, tmp_path):
    features = [feature(i) for i in range(9)]
    upload(site, tmp_path, features)
    plan = prepared(tmp_path, features, each=2)
    with Ledger(tmp_path / "ledger.jsonl", (site.url, IDS.model, IDS.source)) as ledger:
        assert NeuronpediaUploader(TARGET).missing(plan, ledger) == []


def test_features_of_other_content_are_refused_or_left_as_they_are(site, tmp_path):
    upload(site, tmp_path, [feature(0), feature(1)])
    changed = [feature(0, density=0.5), feature(1), feature(2)]
    with pytest.raises(PayloadError, match=r"1 features \(0\) are already at .* with other content.*--keep_uploaded"):
        upload(site, tmp_path, changed)
    upload(site, tmp_path, changed, keep=True)
    assert counts(site) == dict.fromkeys(range(3), 1)
    assert site.stored[IDS.model, IDS.source, 0]["density"] == 0.01


def test_without_its_ledger_the_site_is_asked_for_every_feature(site, tmp_path):
    features = [feature(i) for i in range(6)]
    site.faults = [None, behave.drop_before]
    with pytest.raises(ApiError):
        upload(site, tmp_path, features, Waits().client(site, attempts=1))
    (tmp_path / "ledger.jsonl").unlink()
    site.faults = [behave.drop_before]
    with pytest.raises(ApiError):  # the new ledger knows of a part only
        upload(site, tmp_path, features, Waits().client(site, attempts=1))
    upload(site, tmp_path, features)
    assert counts(site) == dict.fromkeys(range(6), 1)


def test_a_second_layer_of_a_source_set_made_here_is_sent_without_asking(site, tmp_path):
    upload(site, tmp_path, [feature(0)])
    ids = Ids(IDS.model, IDS.source_set, "toy", "blocks.0.hook_resid_post")
    uploader = NeuronpediaUploader(Target(ids, layers=2))
    plan = uploader.prepare_sae_for_upload([feature(0)], tmp_path / "other")
    with Waits().client(site) as client, Ledger(tmp_path / "ledger.jsonl", (site.url, *ids.link.split("/"))) as ledger:
        uploader.upload(plan, client, ledger)
    assert site.activations == {(IDS.model, "1-res-1k", 0): 1, (IDS.model, "0-res-1k", 0): 1}
    assert not [path for method, path in site.requests if method == "GET" and "/feature/" in path]


def test_an_emptied_site_is_reported(site, tmp_path):
    upload(site, tmp_path, [feature(0)])
    site.source_sets.clear()
    with pytest.raises(
        ApiError, match=r"has no source set nanochat-toy/res-1k, but .*ledger.jsonl features were uploaded"
    ):
        upload(site, tmp_path, [feature(0)])


def test_a_feature_without_texts_is_sent_and_one_with_some_is_reported(site, tmp_path, caplog):
    key = (IDS.model, IDS.source)
    site.models[IDS.model] = 2
    site.source_sets[IDS.model, "res-1k"] = ["0-res-1k", "1-res-1k"]
    site.stored[*key, 0] = feature(0, texts=0)
    site.stored[*key, 1], site.activations[*key, 1] = feature(1, texts=1), 1
    upload(site, tmp_path, [feature(0), feature(1)])
    assert counts(site) == {0: 1, 1: 1}
    assert "has 1 of its 2 texts" in caplog.text


def test_a_source_set_of_another_model_is_refused(site, tmp_path):
    site.source_sets[IDS.model, "res-1k"] = ["0-res-1k"]
    with pytest.raises(ApiError, match=r"without the source 1-res-1k.*Choose another --model_id or --source_set"):
        upload(site, tmp_path, [feature(0)])


def test_a_model_that_exists_gets_the_source_set(site, tmp_path, caplog):
    site.models[IDS.model] = 2
    upload(site, tmp_path, [feature(0)])
    assert counts(site) == {0: 1}
    assert "exists already" in caplog.text


def test_a_changed_body_is_not_sent(site, tmp_path):
    plan = prepared(tmp_path, [feature(0)])
    (tmp_path / "bodies" / "batch-0.json").write_text("{}")
    with pytest.raises(PayloadError, match="has changed since it was prepared"):
        plan.body(plan.batches[0])


def test_a_partial_last_line_of_the_ledger_is_ignored_and_a_damaged_one_reported(tmp_path):
    path, key = tmp_path / "ledger.jsonl", ("https://s", "m", "1-s")
    with Ledger(path, key) as ledger:
        ledger.write("sending", {1: "aa", 2: "bb"})
        ledger.write("accepted", {1: "aa"})
    with path.open("ab") as file:
        file.write(b'{"server":"https://s","mod')
    with Ledger(path, key) as ledger:
        assert [ledger.state(i, "aa") for i in (1, 2, 3)] == ["accepted", "sending", None]
        assert ledger.state(1, "cc") == "changed"
        ledger.write("accepted", {2: "bb"})
    with Ledger(path, key) as ledger:
        assert ledger.state(2, "bb") == "accepted"
    with Ledger(path, ("https://other", "m", "1-s")) as ledger:
        assert ledger.state(1, "aa") is None
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(LedgerError, match="line 1 is damaged"), Ledger(path, key):
        pass


def test_two_uploads_cannot_share_a_ledger(tmp_path):
    path, key = tmp_path / "ledger.jsonl", ("https://s", "m", "1-s")
    with Ledger(path, key), pytest.raises(LedgerError, match="another upload is writing"), Ledger(path, key):
        pass


# ---- reading ------------------------------------------------------------------------------------------------------


def test_explanations_are_read_back(site):
    key = (IDS.model, IDS.source, 4)
    site.stored[key] = feature(4)
    scores = [{"explanationScoreTypeName": "recall_alt", "value": 0.75}]
    site.explanations[key] = [
        {"description": "cats", "typeName": "np_max-act", "explanationModelName": "m", "scores": scores},
        {"description": "a person's", "typeName": None, "explanationModelName": None},
    ]
    with Waits().client(site, key=None) as client:
        assert client.explanations(*key) == [
            Explanation("cats", "np_max-act", "m", (("recall_alt", 0.75),)),
            Explanation("a person's", None, None, ()),
        ]
        with pytest.raises(ApiError, match=r"has no feature nanochat-toy/1-res-1k/5"):
            client.explanations(IDS.model, IDS.source, 5)
        with pytest.raises(ApiError, match=r"has no feature \.\./x/5"):
            client.explanations("..", "x", 5)
        site.explanations[key] = [{"text": "of another form"}]
        with pytest.raises(ApiError, match="explanations in an unknown format"):
            client.explanations(*key)


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "toy"
    write_store(run)
    return run


@pytest.fixture
def run(toy_run, tmp_path) -> Path:
    """A run of one SAE with seven living latents."""
    return shutil.copytree(toy_run, tmp_path / "run")


def start(*arguments: str, key: str = KEY, **other) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.publish", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8", "NEURONPEDIA_API_KEY": key},
        **other,
    )


def command(*arguments: str, key: str = KEY) -> tuple[int, str, str]:
    process = start(*arguments, key=key)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def until(event: threading.Event, process: subprocess.Popen) -> None:
    """Waits for something that the process brings about, unless it ends before."""
    while not event.wait(0.02):
        assert process.poll() is None, process.communicate()


def of(run: Path, site: Site | None, *more: str) -> list[str]:
    where = [f"--base_url={site.url}"] if site else []
    return [f"--run_dir={run}", "--layers=3", "--batch_features=2", "--settle=0", *where, *more]


def test_a_killed_upload_resumes_and_sends_every_text_once(site, run):
    came, go = threading.Event(), threading.Event()

    def take_and_hang(site: Site, body: dict) -> None:
        site.store(body)
        came.set()
        go.wait(30)

    site.faults = [None, take_and_hang]
    process = start(*of(run, site, "--yes"))
    until(came, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    go.set()
    assert len(site.activations) == 4

    code, out, err = command(*of(run, site, "--yes"))
    assert (code, err) == (0, "")
    assert "5 features, " in out
    assert "2 were uploaded before" in out
    assert "can neither change nor delete" in out
    assert sorted(index for *_, index in site.activations) == [i for i in range(8) if i != DEAD]
    assert set(site.activations.values()) == {1}
    assert KEY not in out + err + "".join(path.read_text() for path in run.rglob("*.json*"))

    uploads = site.uploads()
    code, out, _ = command(*of(run, site))  # nothing is left, so nobody is asked
    assert code == 0
    assert "7 features are there, 0.0 MB were sent" in out
    assert site.uploads() == uploads


def test_ctrl_c_says_how_to_go_on_and_ends_with_130(site, run):
    came, go = threading.Event(), threading.Event()

    def hang(site: Site, body: dict) -> None:
        came.set()
        go.wait(30)

    site.faults = [hang]
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it may be ignored
    process = start(*of(run, site, "--yes"))
    signal.signal(signal.SIGINT, kept)
    until(came, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    go.set()
    assert process.returncode == 130
    assert "the same command continues" in err
    assert "Traceback" not in err


def test_a_dry_run_writes_the_bodies_and_sends_nothing(site, run):
    code, out, err = command(*of(run, site, "--dry_run"), key="")
    assert (code, err) == (0, "")
    assert "7 features, 0.0 MB in 4 requests; 1 dead are left out" in out
    assert "Nothing was sent." in out
    assert site.requests == []
    folders = list((run / "neuronpedia" / "upload").glob("*/*"))
    assert [len(list(folder.glob("batch-*.json"))) for folder in folders] == [4]
    assert not (run / "neuronpedia" / "uploads.jsonl").exists()
    told = json.loads((folders[0] / "plan.json").read_text())
    assert told["dead"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "nothing to publish"),
        (("--run_dir=x", "--import_to=y"), 2, "give one of them"),
        (("--import_to=y",), 2, "belong together"),
        (("--run_dir=x", "--batch_features=200"), 2, "the site takes 1 to 128"),
        (("--run_dir=nowhere",), 1, "nowhere is not a run"),
        (("--import_to=y", "--folder=nowhere"), 1, "no v1 export in"),
    ],
)
def test_wrong_flags_are_reported(arguments, code, said):
    found, _, err = command(*arguments)
    assert found == code
    assert said in err


def test_nothing_is_sent_without_a_key_or_a_yes(site, run):
    code, _, err = command(*of(run, site, "--yes"), key=" ")
    assert (code, site.requests) == (1, [])
    assert "NEURONPEDIA_API_KEY is not set" in err
    code, out, err = command(*of(run, site))
    assert (code, site.requests) == (1, [])
    assert "give --yes" in err
    assert "7 features" in out
    code, _, err = command(*of(run, site, "--yes", "--model_id=GPT"))
    assert (code, site.requests) == (1, [])
    assert "the model id 'GPT' would be refused" in err


def test_on_a_terminal_the_user_is_asked(site, run):
    for answer, code, n in (("n", 1, 0), ("y", 0, 7)):
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.publish", *of(run, site)],
            cwd=ROOT,
            stdin=slave,
            stdout=subprocess.PIPE,
            env={"PATH": "", "NEURONPEDIA_API_KEY": KEY},
        )
        os.close(slave)
        os.write(master, f"{answer}\n".encode())
        out, _ = process.communicate(timeout=60)
        os.close(master)
        assert b"Send it? [y/N]" in out
        assert process.returncode == code
        assert sum(site.activations.values()) == n


def test_explanations_are_shown(site, run):
    assert command(*of(run, site, "--yes"))[0] == 0
    (key,) = [key for key in site.stored if key[2] == 0]
    site.explanations[key].append({"description": "\x1b[31mred", "typeName": "np_max-act", "explanationModelName": "m"})
    code, out, _ = command(*of(run, site, "--explanations=0"), key="")
    assert code == 0
    assert [line.split("   ", 1)[1] for line in out.splitlines()] == ["token ' cat'", " [31mred   (np_max-act, m)"]
