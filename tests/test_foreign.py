"""Checkpoints of other formats, each against the results of the library that made it."""

import json
import os
import subprocess
import sys

import pytest
from foreign_table import cases, outcomes

CASES = [
    "altered-expert",
    "altered-no-lm-head",
    "altered-no-rope",
    "altered-transposed",
    "altered-unknown-key",
    "flat-numbers",
    "flat-plain-names",
    "gguf-g0-f32",
    "hf-converted-from-g7",
    "hf-gqa",
    "hf-remote-g7-prefixed",
    "hf-sharded-settings",
    "hf-wide-mlp",
    "hub-cache",
    "mlx-gqa",
    "safetensors-g3-meta",
    "safetensors-g7-bare",
    "safetensors-g7-named",
]


def test_every_case_is_run(foreign):
    assert {path.name for path in cases(foreign)} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_checkpoint_is_loaded_or_refused_as_it_must_be(foreign, case):
    told = json.loads((foreign / case / "case.json").read_text())
    found = outcomes(foreign / case)
    assert [outcome.opened for outcome in found] == (told["open"] if isinstance(told["open"], list) else [told["open"]])
    assert not [(outcome.opened, outcome.faults, outcome.message) for outcome in found if outcome.faults]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://toy/nanochat-tiny@gone", r"toy/nanochat-tiny at revision gone is not in the local cache.*offline"),
        ("hf://toy/other", r"toy/other at revision main is not in the local cache.*offline"),
        ("hf://toy/nanochat-tiny/nowhere", r"hf://toy/nanochat-tiny/nowhere .*contains nothing.*offline"),
    ],
)
def test_what_the_cache_lacks_is_named(foreign, address, message):
    code = f"""
import re, sys
from bridge import nanochat
try:
    nanochat.load({address!r})
except FileNotFoundError as error:
    sys.exit(0 if re.search({message!r}, str(error)) else str(error))
sys.exit("it was loaded")
"""
    env = os.environ | {"HF_HUB_CACHE": str(foreign / "hub-cache" / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
