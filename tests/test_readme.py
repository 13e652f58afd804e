"""The README's Python works as it stands, on a run like the demo's, and prints what it found."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from toy_saes import export, toy_sae

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Path:
    """A folder in which runs/demo holds an SAE of the demo's hook."""
    export(toy_sae("topk", 128, 256, k=8, hook_name=HOOK), tmp_path / "runs" / "demo" / "sae" / HOOK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_run_one_after_the_other_and_each_prints_something(demo):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    names: dict[str, object] = {}
    for snippet in snippets:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(snippet, "README.md", "exec"), names)
        assert len(printed.getvalue().splitlines()) >= 2
    assert printed.getvalue().count("latent ") == len(names["tokens"][0])


def test_it_says_how_the_environment_is_activated_and_extras_are_installed_from_a_clone():
    assert ". .venv/bin/activate" in README
    assert 'pip install -e ".[eval,web]"' in README
    assert '"jsae[' not in README
