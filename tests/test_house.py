"""The laws of the house: lint, layers, light imports, quick help, everything packaged."""

import importlib.resources
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "flags.run(" in path.read_text(encoding="utf-8")
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_ruff_has_nothing_to_say(arguments):
    done = run(sys.executable, "-m", "ruff", *arguments, ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_laws_of_import_are_kept():
    done = run(str(Path(sys.executable).with_name("lint-imports")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_names_the_flags(command):
    before = time.perf_counter()
    done = run(sys.executable, "-m", f"experiments.{command}", "--help")
    seconds = time.perf_counter() - before
    assert done.returncode == 0, done.stderr
    assert "--flagfile" in done.stdout
    assert "torch" not in run(sys.executable, "-X", "importtime", "-m", f"experiments.{command}", "--help").stderr
    assert seconds < 2


def test_the_torch_runtime_loads_no_jax():
    modules = "bridge.runtime, bridge.evaluate, bridge.torch_sae, bridge.nanochat.checkpoint, bridge.nanochat.engine"
    check = f"import sys, {modules}; assert 'jax' not in sys.modules"
    done = run(sys.executable, "-c", check)
    assert done.returncode == 0, done.stderr


def test_importing_the_library_starts_no_device():
    check = (
        "import jsae.train, jsae.checkpoint, bridge.stream, experiments.loop, jax;"
        "assert not jax._src.xla_bridge.backends_are_initialized()"
    )
    done = run(sys.executable, "-c", check)
    assert done.returncode == 0, done.stderr


def test_every_package_is_listed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("jsae", "bridge", "experiments")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_the_demo_comes_along_and_is_small():
    demo = importlib.resources.files("bridge.nanochat") / "demo"
    files = [path for path in Path(str(demo)).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"tokenizer.pkl", "token_bytes.pt"} <= names
    assert any(name.startswith("model_") for name in names)
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20


def test_flagfiles_name_flags_that_exist():
    for file in (ROOT / "experiments" / "configs").glob("*.flags"):
        command = "pretrain" if file.stem.startswith("pretrain") else "train"
        help_text = run(sys.executable, "-m", f"experiments.{command}", "--help").stdout
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("--"):
                name = line[2:].split("=")[0].removeprefix("no")
                assert f"{name}=" in help_text or f"[no]{name}" in help_text, (file.name, line)
