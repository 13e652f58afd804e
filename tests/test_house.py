"""The laws of the house: lint, layers, light imports, quick help, everything packaged."""

import ast
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
        "import jsae.train, jsae.checkpoint, bridge.stream, bridge.training.loop, jax;"
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


WRITES = {
    "jsae/files.py": "is the module that writes",
    "jsae/locks.py": "writes the note of a lock, which the operating system holds",
    "jsae/checkpoint.py": "Orbax writes its own folders whole",
    "jsae/records/columns.py: write": "into a folder that is being replaced, the header last",
    "jsae/records/columns.py: ColumnWriter.__init__": "into a folder that is being replaced, the header last",
    "jsae/records/spill.py: Spill.__init__": "scratch in a folder that is being replaced",
    "jsae/records/store.py: ActivationsWriter.finish": "into a folder that is being replaced, the header last",
    "bridge/circuit_tracer.py: _write": "into a folder that is being replaced",
    "bridge/explorer/gather.py: _write": "removes scratch in a folder that is being replaced",
    "bridge/explorer/page.py: _publish": "removes a page that is no longer shown",
    "bridge/neuronpedia/dashboard.py: _write_tokens": "into a folder that is being replaced",
    "bridge/neuronpedia/strict.py: write_json": "into a folder that is being replaced",
    "bridge/neuronpedia/strict.py: write_line": "into a folder that is being replaced",
    "bridge/neuronpedia/strict.py: Lines.add": "into a folder that is being replaced",
    "bridge/nanochat/pretraining.py: save": "removes checkpoints when a later one is whole",
    "bridge/nanochat/tokenizer.py: save": "into memory",
    "experiments/signals.py: end_at_once": "writes to the terminal",
    "experiments/benches/": "into temporary folders of its own; results go through timing.write",
}
"""Where files are written, renamed or removed without `jsae.files`, and why that leaves nothing half there."""

_METHODS = {
    "write_text",
    "write_bytes",
    "unlink",
    "rename",
    "rmtree",
    "rmdir",
    "savefig",
    "touch",
    "tofile",
    "copyfile",
}
_FUNCTIONS = {"np.save", "np.savez", "torch.save", "save_file", "os.write", "os.rename", "os.replace", "os.remove"}


def _writes(call: ast.Call) -> bool:
    """Return whether a call writes, renames or removes a file."""
    name = ast.unparse(call.func)
    method = name.rpartition(".")[2]
    if method == "open" and name not in ("gzip.open", "tokenize.open", "webbrowser.open"):
        mode = call.args[-1:] if name != "open" else call.args[1:2]
        mode = [*mode, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        return any(
            isinstance(m, ast.Constant) and isinstance(m.value, str) and set(m.value) & set("wax+") for m in mode
        )
    if method == "replace":  # of a path: that of a text takes two
        return len(call.args) == 1 and not call.keywords
    if name.startswith("files."):
        return False
    return method in _METHODS or name in _FUNCTIONS or method in ("SummaryWriter", "save_file")


def _replaced(node: ast.With) -> bool:
    """Return whether a block writes what takes the place of something at its end."""
    return any("files.replacing" in ast.unparse(item.context_expr) for item in node.items)


def _direct_writes(file: Path) -> list[tuple[str, int]]:
    """The functions of a file that write without `files`, and the lines."""
    found = []

    def walk(node: ast.AST, place: tuple[str, ...], covered: bool) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            place = (*place, node.name)
        covered = covered or (isinstance(node, ast.With) and _replaced(node))
        if isinstance(node, ast.Call) and _writes(node) and not covered:
            found.append((".".join(place), node.lineno))
        for inner in ast.iter_child_nodes(node):
            walk(inner, place, covered)

    walk(ast.parse(file.read_text(encoding="utf-8")), (), False)
    return found


def test_everything_is_written_through_one_module():
    used, wrong = set(), []
    for top in ("jsae", "bridge", "experiments"):
        for file in sorted((ROOT / top).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            for function, line in _direct_writes(file):
                keys = {key for key in WRITES if f"{name}: {function}" == key or name == key}
                keys |= {key for key in WRITES if key.endswith("/") and name.startswith(key)}
                used |= keys
                if not keys:
                    wrong.append(f"{name}:{line} in {function}")
    assert wrong == [], "write through jsae.files, or say in WRITES why it needs nothing"
    assert set(WRITES) - used <= {"jsae/checkpoint.py"}, "in WRITES, but nothing is written there"


@pytest.mark.parametrize(
    ("code", "direct"),
    [
        ("path.write_text(text)", True),
        ("def f():\n with path.open('wb') as file: pass", True),
        ("open(path, mode='a')", True),
        ("open(path)", False),
        ("path.open('rb')", False),
        ("'a'.replace('a', 'b')", False),
        ("partial.replace(path)", True),
        ("shutil.rmtree(folder)", True),
        ("with files.replacing(path) as partial:\n partial.write_bytes(data)", False),
        ("files.write(path, data)", False),
        ("np.save(path, array)", True),
    ],
)
def test_direct_writes_are_known_when_they_are_seen(code, direct, tmp_path):
    (tmp_path / "module.py").write_text(code)
    assert bool(_direct_writes(tmp_path / "module.py")) == direct
