"""Files that are made to fill a machine are refused in one line, quickly and in little memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_text import CASES, MAX_BYTES, MAX_SECONDS, Outcome

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Cost of reading each file, in processes that hold nothing but what a command holds."""
    command = [sys.executable, "-m", "tests.hostile_text", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: Outcome(*rest) for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_in_one_line_30_seconds_and_500_mb(outcomes, name):
    outcome = outcomes[name]
    assert outcome.message.startswith(name)
    assert re.search(CASES[name].message, outcome.message)
    assert "\n" not in outcome.message
    assert outcome.cpu < MAX_SECONDS
    assert outcome.peak < MAX_BYTES
