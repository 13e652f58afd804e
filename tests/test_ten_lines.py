"""The README's ten lines of Python, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ten_lines() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- ten lines -->\n```python\n(.*?)```", text, re.DOTALL)
    return code


def test_they_are_ten_at_most():
    assert len([line for line in ten_lines().splitlines() if line.strip()]) <= 10


def test_they_train_save_load_and_print(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ten_lines()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fvu = re.fullmatch(r"TrainedSAE\(topk, d_in=64, d_sae=256, k=4\) \(5, 256\) FVU (0\.\d+)\n", done.stdout)
    assert fvu is not None, done.stdout
    assert float(fvu[1]) < 0.1
    assert done.stderr.splitlines()[-1].startswith("training: 100 %")
    assert {path.name for path in (tmp_path / "my_sae").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
