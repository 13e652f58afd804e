"""The README's Python for a nanochat works as it stands, and its shell commands say what a clone needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_training_on_a_nanochat_runs_and_prints_what_came_of_it(tmp_path):
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "bridge.train" in code)
    words = [sys.executable, "-c", code]
    shown = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run(words, cwd=tmp_path, timeout=500, check=False, **shown)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"G7 1024 \{'blocks.2.hook_resid_post': 0\.\d+\}", done.stdout.splitlines()[-1])


def test_it_says_how_the_environment_is_activated_and_extras_are_installed_from_a_clone():
    assert "source .venv/bin/activate" in README
    assert 'pip install -e ".[web,eval]"' in README
    assert '"jsae[' not in README
