"""Pushing to the hub: the library itself against a hub on this machine, what is sent and what never is, the card."""

import base64
import dataclasses
import json
import logging
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import explorer_toy as toy
import huggingface_hub
import pytest
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from bridge import hub
from bridge.runtime import load_saes
from jsae import extras

REPO = "someone/nanochat-toy-saes"
OTHER = "blocks.1.hook_mlp_out"


@dataclasses.dataclass
class Hub:
    """A hub: the visibility of its repositories, their files, and its requests."""

    url: str
    private: dict[str, bool] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    asked: list[str] = dataclasses.field(default_factory=list)

    @property
    def api(self) -> huggingface_hub.HfApi:
        return huggingface_hub.HfApi(endpoint=self.url, token="hf_token")


class Handler(BaseHTTPRequestHandler):
    """The calls of the hub's API that a commit of small files makes."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, told: object, status: int = 200) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        self.answer({"_id": "1", "id": REPO, "private": self.hub.private[REPO]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.asked.append(self.path)
        assert self.headers["Authorization"] == "Bearer hf_token" or self.path == "/api/validate-yaml"
        if self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            status = 409 if name in self.hub.private else 200
            self.hub.private.setdefault(name, told.get("private") or told.get("visibility") == "private")
            self.answer({"url": f"{self.hub.url}/{name}"}, status)
        elif self.path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            yaml.safe_load(text.split("---\n")[1])
            self.answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            named = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": named})
        else:
            assert self.path == f"/api/models/{REPO}/commit/main"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.hub.url}/{REPO}/commit/0", "commitOid": "0"})


@pytest.fixture
def local_hub():
    server = HTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Handler.hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of two hooks, with secrets and half-written exports beside what may leave."""
    folder = tmp_path / "run"
    for hook in (toy.HOOK, OTHER):
        toy.write_store(folder, hook)
        (folder / "sae" / hook / "notes.txt").write_text("secret")
    shutil.copytree(folder / "sae" / OTHER, folder / "sae" / f"{OTHER}.unfinished")
    shutil.copytree(folder / "sae" / OTHER, folder / "sae" / f"{OTHER}.outdated")
    figures = {
        "tokens": 199240.0,
        "fvu": 0.0738,
        "l0": 32.0,
        "dead_fraction": float("nan"),
        "model_performance_preservation": {"ce_loss_score": 0.9888},
        "setting": {"checkpoint": "/home/someone/model.pt"},
    }
    (folder / "eval.json").write_text(json.dumps({toy.HOOK: figures}))
    (folder / "config.json").write_text(json.dumps({"facts": {"data": "9d80d4"}, "flags": {"token": "secret"}}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fvu": 0.25}\n{"step": 3, "fv')
    return folder


def change(run: Path, hook: str = toy.HOOK, **metadata: object) -> None:
    file = run / "sae" / hook / "cfg.json"
    cfg = json.loads(file.read_text())
    cfg["metadata"] |= metadata
    file.write_text(json.dumps(cfg))


NAMES = {
    "README.md",
    *(f"{hook}/{name}" for hook in (toy.HOOK, OTHER) for name in ("cfg.json", "sae_weights.safetensors")),
}


def test_the_library_sends_what_was_planned_and_nothing_else(run, local_hub):
    sent = hub.push(run, REPO, license="mit", api=local_hub.api)
    assert {upload.path for upload in sent} == set(local_hub.files) == NAMES
    assert all(len(local_hub.files[upload.path]) == upload.size for upload in sent)
    assert not any(b"secret" in content for content in local_hub.files.values())
    assert local_hub.private == {REPO: False}


def test_what_was_sent_is_read_here_and_by_saelens(run, local_hub, tmp_path):
    hub.push(run, REPO, license="mit", api=local_hub.api)
    for name, content in local_hub.files.items():
        file = tmp_path / "fetched" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert set(load_saes(tmp_path / "fetched")) == {toy.HOOK, OTHER}
    from sae_lens import SAE

    theirs = SAE.load_from_disk(tmp_path / "fetched" / toy.HOOK)
    assert theirs.cfg.d_sae == toy.D_SAE
    assert theirs.cfg.metadata.hook_name == toy.HOOK


def test_densities_go_along_where_there_are_some(run):
    file = run / "sae" / toy.HOOK / "sparsity.safetensors"
    file.write_bytes(b"\0" * 7)
    uploads = {upload.path: upload for upload in hub.plan(run, REPO, license="mit")}
    assert uploads[f"{toy.HOOK}/sparsity.safetensors"].size == 7
    assert set(uploads) == NAMES | {f"{toy.HOOK}/sparsity.safetensors"}


def test_only_the_asked_for_hooks_are_sent(run, local_hub):
    hub.push(run, REPO, license="mit", hooks=[OTHER], api=local_hub.api)
    assert {name.partition("/")[0] for name in local_hub.files} == {"README.md", OTHER}
    assert toy.HOOK.encode() not in local_hub.files["README.md"]
    with pytest.raises(FileNotFoundError, match=f"no SAE of blocks.5.hook_mlp_out; it has {OTHER}, {toy.HOOK}"):
        hub.plan(run, REPO, license="mit", hooks=["blocks.5.hook_mlp_out"])


def test_a_second_push_goes_to_the_same_repository(run, local_hub):
    hub.push(run, REPO, license="mit", api=local_hub.api)
    hub.push(run, REPO, license="apache-2.0", api=local_hub.api)
    assert b'license: "apache-2.0"' in local_hub.files["README.md"]


def test_a_dry_run_tells_names_and_sizes_and_asks_nobody(run, local_hub, caplog):
    with caplog.at_level(logging.INFO, "bridge.hub"):
        uploads = hub.push(run, REPO, license="mit", dry_run=True, api=local_hub.api)
    assert {upload.path for upload in uploads} == NAMES
    assert local_hub.asked == []
    weights = (run / "sae" / OTHER / "sae_weights.safetensors").stat().st_size
    assert f"would send {OTHER}/sae_weights.safetensors: {weights:,} bytes" in caplog.text


def test_nothing_private_goes_to_a_public_repository(run, local_hub):
    hub.push(run, REPO, license="mit", private=True, api=local_hub.api)
    assert local_hub.private == {REPO: True}
    local_hub.private[REPO] = False
    local_hub.files.clear()
    with pytest.raises(ValueError, match="is public, but a private one"):
        hub.push(run, REPO, license="mit", private=True, api=local_hub.api)
    assert local_hub.files == {}


@pytest.mark.parametrize(
    "name",
    ["", "alone", "a/b/c", "a/", "/b", "a/b--c", "a/..b", "a/-b", "a/b.", "a/b.git", "a b/c", "é/b", "a/" + "b" * 95],
)
def test_a_repository_the_hub_would_refuse_is_refused_before_anything(name, tmp_path, local_hub):
    with pytest.raises(ValueError, match="not a repository id"):
        hub.push(tmp_path / "nowhere", name, license="mit", api=local_hub.api)
    assert local_hub.asked == []


@pytest.mark.parametrize("name", ["a/b", "some-one/nano_chat.d20", "A1/" + "b" * 93])
def test_a_repository_the_library_takes_is_taken(name, tmp_path):
    validate_repo_id(name)
    with pytest.raises(FileNotFoundError, match="no exported SAE"):
        hub.plan(tmp_path, name, license="mit")
    with pytest.raises(HFValidationError):
        validate_repo_id(name + "--")


@pytest.mark.parametrize("license", ["", "MIT License", "mit\ntags: x", '"'])
def test_a_licence_that_is_no_identifier_is_refused(run, license):
    with pytest.raises(ValueError, match="not a licence of the hub"):
        hub.plan(run, REPO, license=license)


def test_a_licence_must_be_said(run):
    with pytest.raises(TypeError, match="license"):
        hub.push(run, REPO)


def test_without_a_token_it_is_said_how_to_get_one(run, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        hub.push(run, REPO, license="mit")


def test_without_the_library_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(extras.advice("hub"))):
        hub.push(run, REPO, license="mit")
    assert hub.push(run, REPO, license="mit", dry_run=True)


def test_broken_exports_are_not_sent(run, local_hub):
    weights = run / "sae" / toy.HOOK / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is broken"):
        hub.push(run, REPO, license="mit", api=local_hub.api)
    weights.unlink()
    with pytest.raises(ValueError, match="is incomplete"):
        hub.push(run, REPO, license="mit", api=local_hub.api)
    weights.write_bytes(whole)
    cfg = run / "sae" / toy.HOOK / "cfg.json"
    cfg.write_text(cfg.read_text().replace(f'"d_sae": {toy.D_SAE}', '"d_sae": 9'))
    with pytest.raises(ValueError, match="W_dec"):
        hub.push(run, REPO, license="mit", api=local_hub.api)
    cfg.write_text("{")
    with pytest.raises(ValueError, match="is broken"):
        hub.push(run, REPO, license="mit", api=local_hub.api)
    assert local_hub.asked == []


@pytest.mark.parametrize("path", ["/home/someone/corpus", "~/corpus", "../someone/corpus", "C:\\someone\\corpus"])
def test_paths_of_this_machine_stay_here(run, path):
    change(run, dataset_path=path, list=[path])
    uploads = {upload.path: upload for upload in hub.plan(run, REPO, license="mit")}
    cfg = json.loads(uploads[f"{toy.HOOK}/cfg.json"].content)
    assert cfg["metadata"]["dataset_path"] == "corpus"
    assert cfg["metadata"]["list"] == ["corpus"]
    assert cfg["metadata"]["hook_name"] == toy.HOOK
    assert b"someone\\" not in uploads["README.md"].content
    assert b"/home" not in uploads["README.md"].content


def test_the_card_says_data_metrics_model_and_licence(run):
    change(run, dataset_path="karpathy/fineweb", training_tokens=4000000)
    text = hub.card(run, REPO, license="cc-by-4.0")
    read = huggingface_hub.ModelCard(text)
    assert read.data.license == "cc-by-4.0"
    assert read.data.library_name == "saelens"
    assert "sparse-autoencoder" in read.data.tags
    assert f"| `{toy.HOOK}` | topk | {toy.D_IN} | {toy.D_SAE} | 2 | 4,000,000 |" in text
    assert f"| `{OTHER}` | topk | {toy.D_IN} | {toy.D_SAE} | 2 | – |" in text
    assert "`karpathy/fineweb`" in text
    assert "| fraction of variance unexplained | 0.0738 |" in text
    assert "| loss recovered, over zero ablation | 0.9888 |" in text
    assert "| tokens measured | 199,240 |" in text
    assert "never fire" not in text  # which was not measured: NaN
    assert "ab" * 32 in text
    assert f'SAE.from_pretrained("{REPO}", "{OTHER}")' in text
    assert text.endswith("`cc-by-4.0`.\n")


def test_without_an_evaluation_the_card_says_what_training_said(run):
    (run / "eval.json").unlink()
    text = hub.card(run, REPO, license="mit")
    assert "| at the end of training, not on held-out text |  |" in text
    assert "| fraction of variance unexplained | 0.25 |" in text
    (run / "metrics.jsonl").unlink()
    assert "None were measured." in hub.card(run, REPO, license="mit")


def test_names_cannot_write_on_the_card(run):
    change(run, dataset_path="x`\n# Heading\n<script>|", model_name="a|b\n---\nlicense: other")
    text = hub.card(run, REPO, license="mit")
    assert huggingface_hub.ModelCard(text).data.license == "mit"
    assert "\n# Heading" not in text
    assert "<script>" not in text
