"""SAEs on the hub: `hf://owner/name/folder` for jsae and torch, how much is fetched, and what is said if it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_hub import SHA, running

from jsae import export, extras
from jsae.architectures import sae_config

D, F, HOOK = 6, 10, "blocks.1.hook_resid_post"
LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import bridge, jsae
answers = []
for address in sys.argv[1:]:
    try:
        ours, theirs = jsae.load(address), bridge.load_sae(address)
        answers.append([ours.architecture, ours.d_sae, float(abs(ours.W_dec - theirs.W_dec.numpy()).max())])
    except (ValueError, OSError, ImportError) as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def load(tmp_path: Path, *addresses: str, endpoint: str = "http://127.0.0.1:9", code: str = LOAD, **env: str) -> list:
    env = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")} | env
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", code, *addresses]
    run = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def write(folder: Path, architecture: str, **settings) -> None:
    random = np.random.default_rng(0)
    weights = {"W_enc": (F, D), "W_dec": (F, D), "b_dec": (D,), "b_enc": (F,)}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    export.write(folder, sae_config(architecture, D, F, **settings), weights, 1.0, 1.0, {"hook_name": HOOK})


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list]:
    """Results of several addresses, and the files fetched for the first."""
    place = tmp_path_factory.mktemp("hub")
    site = place / "site" / "toy"
    write(site / "saes" / HOOK, "topk", k=3)
    write(site / "saes" / "deep" / "er", "relu")
    write(site / "flat", "relu")
    for name in ("modeling.py", f"{HOOK}/setup.py", f"{HOOK}/sparsity.safetensors", "README.md"):
        (site / "saes" / name).write_text("raise RuntimeError")
    write(site / "large" / "weights", "topk", k=3)
    (site / "large" / "weights" / "sae_weights.safetensors").write_bytes(bytes(20 * 2**20))
    write(site / "large" / "settings", "topk", k=3)
    (site / "large" / "settings" / "cfg.json").write_text(" " * (17 * 2**20))
    (site / "none").mkdir()
    (site / "none" / "config.json").write_text("{}")
    good = [f"hf://toy/saes/{HOOK}", f"hf://toy/saes@v1/{HOOK}", f"hf://toy/saes@{SHA}/deep/er", "hf://toy/flat"]
    bad = [
        *(
            "hf://toy/saes",
            "hf://toy/saes/other",
            "hf://toy/none",
            "hf://toy/missing/x",
            "hf://toy/gated/x",
            "hf://toy",
        ),
        *("hf://toy/saes@nosuch/x", "hf://toy/saes/../../x", "hf://toy/large/weights", "hf://toy/large/settings"),
    ]
    with running(place / "site") as hub:
        found = dict(zip([*good, *bad], load(place, *good, *bad, endpoint=hub.endpoint), strict=True))
        found["fetched"] = hub.fetched
    found["cached"] = load(place, good[0], "hf://toy/saes/deep/other", HF_HUB_OFFLINE="1")
    found["nothing answers"] = load(place, good[3])
    return found


def test_an_sae_is_loaded_alike_by_jax_and_torch_at_any_revision(answers):
    assert answers[f"hf://toy/saes/{HOOK}"] == answers[f"hf://toy/saes@v1/{HOOK}"] == ["topk", F, 0.0]
    assert answers[f"hf://toy/saes@{SHA}/deep/er"] == answers["hf://toy/flat"] == ["standard", F, 0.0]


def test_only_settings_and_weights_are_fetched_and_each_once(answers):
    folders, names = (f"{HOOK}/", "deep/er/", ""), ("cfg.json", "sae_weights.safetensors")
    expected = [*(folder + name for folder in folders for name in names), "weights/cfg.json"]
    assert sorted(answers["fetched"]) == sorted(expected)


def test_afterwards_the_local_cache_serves(answers):
    kept, missing = answers["cached"]
    assert kept == ["topk", F, 0.0]
    assert missing[0] == "FileNotFoundError"
    assert "in the local cache; the hub is in offline mode" in missing[1]
    assert answers["nothing answers"] == [["standard", F, 0.0]]


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("hf://toy/saes", "FileNotFoundError", f"is not an exported SAE.*it has {HOOK}, deep/er: name one, hf://owner"),
        ("hf://toy/saes/other", "FileNotFoundError", f"it has {HOOK}, deep/er: name one"),
        ("hf://toy/none", "FileNotFoundError", "the repository has none"),
        ("hf://toy/missing/x", "FileNotFoundError", "does not exist on the hub, or is private"),
        ("hf://toy/gated/x", "FileNotFoundError", "is gated: ask for access"),
        ("hf://toy/saes@nosuch/x", "FileNotFoundError", "has no revision nosuch"),
        ("hf://toy", "ValueError", "give hf://owner/name"),
        ("hf://toy/saes/../../x", "ValueError", "leaves its repository"),
        ("hf://toy/large/weights", "ValueError", "sae_weights.safetensors has 20,971,520 bytes, and at most"),
        ("hf://toy/large/settings", "ValueError", "cfg.json has 17,825,792 bytes, and at most 16,777,216"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_a_remedy(answers, address, kind, words):
    import re

    assert answers[address][0] == kind
    assert re.search(words, answers[address][1]), answers[address][1]
    assert "\n" not in answers[address][1]


def test_without_the_library_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['huggingface_hub'] = None\n" + LOAD
    found = load(tmp_path, "hf://toy/saes/x", code=code)
    assert found == [["ImportError", f"hf://toy/saes/x needs huggingface_hub: {extras.advice('hub')}"]]
