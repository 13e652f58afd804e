"""hf:// addresses: what they mean, what is fetched of a repository, and what is said when that does not work."""

import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from model_hub import SHA, running
from tiny_nanochat import tiny, write

from bridge.nanochat import hub
from bridge.nanochat import tokenizer as tokenizers
from bridge.nanochat.tokenizer import Tokenizer
from jsae import extras

LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
from bridge import nanochat
answers = []
for address in sys.argv[1:]:
    path, _, step = address.partition("#")
    try:
        nano = nanochat.load(path, int(step) if step else None)
        answers.append([nano.name, nano.config.n_layer, nano.tokenizer and nano.tokenizer.vocab_size])
    except (ValueError, OSError, ImportError) as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


@pytest.mark.parametrize(
    ("text", "repo", "revision", "folder", "name"),
    [
        ("hf://toy/nano", "toy/nano", None, ".", "nano"),
        ("hf://toy/nano-1.5_x/", "toy/nano-1.5_x", None, ".", "nano-1.5_x"),
        ("hf://toy/nano@v1", "toy/nano", "v1", ".", "nano"),
        ("hf://toy/nano/base_checkpoints/d20", "toy/nano", None, "base_checkpoints/d20", "d20"),
        ("hf://toy/nano@refs%2Fpr%2F1/a/b", "toy/nano", "refs/pr/1", "a/b", "b"),
        ("hf://toy/nano@refs/pr/1/a", "toy/nano", "refs/pr/1", "a", "a"),
        ("hf://toy/nano@feature%2Fx", "toy/nano", "feature/x", ".", "nano"),
        (Path("hf://toy/nano@v1/a"), "toy/nano", "v1", "a", "a"),
    ],
)
def test_an_address_has_an_id_a_revision_and_a_folder(text, repo, revision, folder, name):
    assert hub.is_address(text)
    address = hub.parse(text)
    assert (address.repo, address.revision, address.folder) == (repo, revision, PurePosixPath(folder))
    assert address.name == name
    assert hub.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://toy",
        "hf://toy/",
        "hf://toy/..",
        "hf://../x",
        "hf://toy/nano@",
        "hf://toy/nano@v1@v2",
        "hf://-toy/nano",
        "hf://toy/na no",
        "hf://toy/n\nx",
        "hf://a/b/../../c",
        "hf://datasets/a/b",
    ],
)
def test_an_invalid_address_is_refused_with_the_form(text):
    with pytest.raises(ValueError, match=r"give hf://owner/name\[@revision\]\[/folder\]"):
        hub.parse(text)


def test_local_paths_are_no_addresses():
    assert not any(map(hub.is_address, ["demo", "runs/hf", "/hf://x", "http://x", Path("hf"), None]))


@pytest.fixture
def root(tmp_path) -> Path:
    return site_of(tmp_path)


def site_of(place: Path) -> Path:
    """A base directory with several steps, code, and what else lies in repositories."""
    folder = place / "site" / "toy" / "nano"
    for step, n in ((2, 2), (10, 3), (9, 4)):
        write(folder / "base_checkpoints" / "d4", tiny("G7", n_layer=n, vocab_size=265), "G7", step=step)
    write(folder / "base_checkpoints" / "d2", tiny("G7", n_layer=2, vocab_size=265), "G7", step=50)
    tokenizers.save(Tokenizer({bytes([i]): i for i in range(256)}), folder / "tokenizer")
    for name in ("modeling_nanochat.py", "README.md", "base_checkpoints/d4/optim_000010_rank0.pt", "setup.py"):
        (folder / name).write_text("raise RuntimeError")
    write(place / "site" / "toy" / "flat", tiny("G7", vocab_size=50), "G7")
    for name in ("a", "b"):
        write(place / "site" / "toy" / "many" / name, tiny("G7"), "G7")
    return place / "site"


def load(tmp_path: Path, *addresses: str, endpoint: str = "http://127.0.0.1:9", **env: str) -> list:
    env = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")} | env
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", LOAD, *addresses]
    run = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_only_the_newest_step_and_no_code_is_fetched_and_then_the_cache_serves(tmp_path, root):
    with running(root) as site:
        addresses = ["hf://toy/nano", "hf://toy/nano@v1", f"hf://toy/nano@{SHA}", "hf://toy/nano@refs%2Fpr%2F1"]
        assert load(tmp_path, *addresses, endpoint=site.endpoint) == [["nano", 3, 265]] * 4
        assert set(site.fetched) == {
            "base_checkpoints/d4/model_000010.pt",
            "base_checkpoints/d4/meta_000010.json",
            "tokenizer/tokenizer.pkl",
            "tokenizer/token_bytes.pt",
        }
        assert len(site.fetched) == 4
        found = load(
            tmp_path, "hf://toy/nano#9", "hf://toy/nano/base_checkpoints/d2", "hf://toy/flat", endpoint=site.endpoint
        )
        assert found == [["nano", 4, 265], ["d2", 2, 265], ["flat", 4, None]]
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert load(tmp_path, "hf://toy/nano@v1", **env) == [["nano", 3, 265]]
    assert not list((tmp_path / "cache").rglob("*.py"))


def test_a_file_of_a_repository_can_be_named(tmp_path, root):
    with running(root) as site:
        address = "hf://toy/nano/base_checkpoints/d4/model_000002.pt"
        assert load(tmp_path, address, endpoint=site.endpoint) == [["model_000002.pt", 2, 265]]


WRONG = [
    (
        "hf://toy/none",
        "FileNotFoundError",
        ["toy/none", "revision main", "does not exist", "private", "hf auth login"],
    ),
    ("hf://toy/private@v1", "FileNotFoundError", ["toy/private", "revision v1", "private", "HF_TOKEN"]),
    ("hf://toy/gated", "FileNotFoundError", ["toy/gated", "revision main", "gated", "ask for access"]),
    ("hf://toy/nano@gone", "FileNotFoundError", ["toy/nano", "no revision gone", "branches"]),
    ("hf://toy/nano#77", "FileNotFoundError", ["no step 77", "hf://toy/nano", "there are 2, 9, 10"]),
    ("hf://toy/nano/nowhere", "FileNotFoundError", ["hf://toy/nano/nowhere", "contains nothing"]),
    ("hf://toy/many", "ValueError", ["several models, a, b", "hf://owner/name"]),
    ("hf://toy/broken", "FileNotFoundError", ["toy/broken", "revision main", "cannot be reached", "500"]),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list[str]]:
    """Errors of loading each wrong address, all from one process."""
    folder = tmp_path_factory.mktemp("wrong")
    with running(site_of(folder)) as site:
        found = load(folder, *(address for address, _, _ in WRONG), endpoint=site.endpoint)
    return {address: answer for (address, _, _), answer in zip(WRONG, found, strict=True)}


@pytest.mark.parametrize(("address", "kind", "words"), WRONG)
def test_failures_are_reported_with_id_revision_and_remedy(answers, address, kind, words):
    found, message = answers[address]
    assert found == kind, message
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


def test_a_hub_that_does_not_answer_is_reported(tmp_path):
    ((kind, message),) = load(tmp_path, "hf://toy/nano@v1")
    assert kind == "FileNotFoundError", message
    assert all(word in message for word in ("toy/nano", "revision v1", "cannot be reached", "hf download toy/nano"))


def test_without_the_library_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['huggingface_hub'] = None\n" + LOAD
    run = subprocess.run([sys.executable, "-c", code, "hf://toy/nano"], capture_output=True, text=True, check=False)
    assert json.loads(run.stdout) == [["ImportError", f"hf://toy/nano needs huggingface_hub: {extras.advice('hub')}"]]
