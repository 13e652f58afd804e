"""The laws of the house: lint, layers, light imports, quick help, everything packaged."""

import abc
import ast
import graphlib
import importlib
import importlib.resources
import importlib.util
import inspect
import os
import pkgutil
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
import tiers

import bridge
import jsae

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "flags.run(" in path.read_text(encoding="utf-8")
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_ruff_has_nothing_to_say(arguments):
    done = run(sys.executable, "-m", "ruff", *arguments, ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_types():
    done = run(sys.executable, "-m", "mypy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_slow_test_that_is_named_exists():
    for module in {*tiers.MODULES, *tiers.TESTS}:
        tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert set(tiers.TESTS.get(module, ())) <= functions, f"tests/tiers.py names tests that {module} does not have"
    assert not set(tiers.MODULES) & set(tiers.TESTS), "in both tables of tests/tiers.py"


@pytest.mark.parametrize(
    ("marks", "wanted"),
    [("gpu", True), ("gpu and not slow", True), ("", False), ("not slow", False), ("not gpu", False), ("gpus", False)],
)
def test_the_gpu_tier_is_the_one_that_is_asked_for(marks, wanted):
    assert tiers.wants_gpu(marks) is wanted


def test_without_a_gpu_its_tier_fails_and_says_so():
    nothing = {name: value for name, value in os.environ.items() if name != "JSAE_REHEARSAL"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=nothing | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "no GPU was found" in done.stdout + done.stderr


def test_the_packages_say_that_they_are_typed():
    settings = PYPROJECT["tool"]["setuptools"]["package-data"]
    for package in ("jsae", "bridge"):
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in settings[package]


def test_the_version_is_the_changelogs():
    version = PYPROJECT["project"]["version"]
    assert version == jsae.__version__
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1].startswith(f"{version} (")


def test_the_laws_of_import_are_kept():
    done = run(str(Path(sys.executable).with_name("lint-imports")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in turn; [] if there are none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", ["jsae", "bridge", "experiments"])
def test_no_modules_import_each_other_in_a_circle(package):
    """Imports for annotations and those within functions count too."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    assert circle({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) != []
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_names_the_flags(command, seconds_of_the_libraries):
    done = run(sys.executable, "-m", f"experiments.{command}", "--help")
    assert done.returncode == 0, done.stderr
    assert "--flagfile" in done.stdout
    imported = run(sys.executable, "-X", "importtime", "-m", f"experiments.{command}", "--help").stderr
    assert not re.search(r"\| +torch$", imported, re.MULTILINE)
    spent = (timed("-m", f"experiments.{command}", "--help") for _ in range(3))  # a core is slower while its twin works
    assert any(seconds < 1.6 * seconds_of_the_libraries for seconds in spent)


@pytest.fixture(scope="module")
def seconds_of_the_libraries() -> float:
    """CPU seconds of importing the libraries of SAEs."""
    return min(timed("-c", "import jax, flax.nnx, optax") for _ in range(3))


def timed(*arguments: str) -> float:
    """Run Python; return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(sys.executable, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_torch_runtime_loads_no_jax():
    modules = "bridge.runtime, bridge.evaluate, bridge.torch_sae, bridge.nanochat.checkpoint, bridge.nanochat.engine"
    check = f"import sys, {modules}; assert 'jax' not in sys.modules"
    done = run(sys.executable, "-c", check)
    assert done.returncode == 0, done.stderr


def test_importing_the_library_starts_no_device():
    check = (
        "import jsae.loop, jsae.checkpoint, bridge.stream, bridge.training.loop, jax;"
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
    "bridge/training/pipeline.py: silence": "into the null device",
    "bridge/explorer/gather.py: _write": "removes scratch in a folder that is being replaced",
    "bridge/explorer/page.py: _put": "into a folder that is being replaced",
    "bridge/explorer/page.py: _publish": "removes a page that is no longer shown",
    "bridge/lenses/fitting.py: _finish": "removes an unfinished fit when the finished one is whole",
    "bridge/lenses/lens_file.py: save": "into memory",
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


LAYOUT_FOLDERS = {"sae", "stages", "explorer", "records", "checkpoints", "tb", "plots", "neuronpedia", "upload"}
LAYOUT_FILES = {
    *("config.json", "metrics.jsonl", "eval.json", "latents.json", "labels.json", "stages.json"),
    *("notes.jsonl", "uploads.jsonl"),
}
ELSEWHERE = {
    "bridge/run/": "owns the layout of a run",
    "bridge/nanochat/": "config.json of a checkpoint in the layout of other libraries",
    "bridge/delphi.py": "delphi's own config.json",
    "experiments/benches/": "temporary folders of its own",
    "jsae/testing/": "temporary folders of its own",
}
"""Where names of files and folders of a run are written down, and why."""


def _layout_names(code: str) -> set[str]:
    """Return the parts of paths in some code that are names within a run directory."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        operands = [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("joinpath", "Path", "glob"):
            operands += node.args
        for operand in operands:
            found |= LAYOUT_FOLDERS & _parts(*(operand.values if isinstance(operand, ast.JoinedStr) else [operand]))
        found |= LAYOUT_FILES & _parts(node)
    return found


def _parts(*nodes: ast.AST) -> set[str]:
    """Return the parts of the paths that constants are; prose is none."""
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {part for text in texts if " " not in text for part in text.split("/")}


def test_the_layout_of_a_run_is_spelt_in_one_package():
    used, wrong = set(), []
    for top in ("jsae", "bridge", "experiments"):
        for file in sorted((ROOT / top).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if found := _layout_names(file.read_text(encoding="utf-8")):
                places = {place for place in ELSEWHERE if name.startswith(place)}
                used |= places
                if not places:
                    wrong.append(f"{name}: {', '.join(sorted(found))}")
    assert wrong == [], "ask bridge.run.Run where it lies, or say in ELSEWHERE what it is"
    assert set(ELSEWHERE) == used


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("run / 'sae' / hook", ["sae"]),
        ("Path(run, 'explorer/records')", ["explorer", "records"]),
        ("run.joinpath('tb')", ["tb"]),
        ("f'{run}/eval.json'", ["eval.json"]),
        ("run / f'plots/{name}.png'", ["plots"]),
        ("entry['sae']", []),
        ("total / count['records']", []),
        ('"""Writes eval.json into the run."""', []),
        ("cosine / norm", []),
    ],
)
def test_names_of_a_runs_files_are_known_when_they_are_seen(code, names):
    assert _layout_names(code) == set(names)


def test_processes_that_may_not_write_large_files_write_no_compiled_modules():
    limiting = [p for p in sorted(Path(__file__).parent.glob("test_*.py")) if "RLIMIT_" + "FSIZE" in p.read_text()]
    assert limiting
    for file in limiting:
        assert "env=file_limit.ENVIRONMENT" in file.read_text() or "{**file_limit.ENVIRONMENT" in file.read_text(), file


def _unguarded(file: Path) -> list[int]:
    """The lines of a file that read JSON where too deep a text would raise RecursionError."""
    found = []

    def walk(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            guarded = False
        reads = isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load")
        if reads and not guarded and not ast.unparse(node.args[0]).startswith("json.dumps("):
            found.append(node.lineno)
        caught = isinstance(node, ast.Try) and any("RecursionError" in ast.unparse(h.type) for h in node.handlers)
        for inner in ast.iter_child_nodes(node):
            walk(inner, guarded or (caught and inner in node.body))

    walk(ast.parse(file.read_text(encoding="utf-8")), False)
    return found


def test_json_that_is_nested_too_deeply_is_an_error_like_any_other():
    """`json` raises RecursionError: `jsae.jsons` makes a ValueError of it, whoever calls `json` expects it."""
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for top in ("jsae", "bridge", "experiments")
        for file in sorted((ROOT / top).rglob("*.py"))
        if "benches" not in file.parts and file.name not in _CALLED_WITHIN
        for line in _unguarded(file)
    ]
    assert wrong == []


_CALLED_WITHIN = {"lines.py": "its callers expect RecursionError"}


# ---- classes ---------------------------------------------------------------------------------------------------------

HOOKS = {
    ("SAE", "initial_statistics"): "no statistics by default",
    ("SAE", "batch_statistics"): "no statistics by default",
    ("SAE", "initialize_latents"): "nothing by default",
    ("SAE", "own_arrays"): "the same arrays by default",
    ("SAE", "loss_of_dead"): "no such loss by default",
}
"""Methods that a subclass may define again, because what they do by default is nothing."""


def _classes() -> list[type]:
    found = []
    for top in (jsae, bridge):
        for module in pkgutil.walk_packages(top.__path__, f"{top.__name__}."):
            if module.name.startswith("jsae.ops.kernels.") and importlib.util.find_spec("triton") is None:
                continue  # functions only
            members = vars(importlib.import_module(module.name)).values()
            found += [c for c in members if inspect.isclass(c) and c.__module__ == module.name]
    return found


def _overridden(cls: type) -> list[tuple[str, str]]:
    """The concrete methods of our own classes that a class defines again: (class, method)."""
    found = []
    for name, value in vars(cls).items():
        if name.startswith("__") or not (callable(value) or isinstance(value, classmethod | staticmethod | property)):
            continue
        for base in cls.__mro__[1:]:
            ours = base.__module__.split(".")[0] == cls.__module__.split(".")[0]
            if ours and name in vars(base) and not getattr(vars(base)[name], "__isabstractmethod__", False):
                found.append((base.__name__, name))
                break
    return found


def test_classes_are_abstract_or_final():
    classes = _classes()
    assert len(classes) > 200
    found = {(c.__qualname__, *method) for c in classes for method in _overridden(c) if method not in HOOKS}
    assert found == set(), "a concrete method is defined again: make it abstract, or call another one"


def test_a_method_that_is_defined_again_is_seen():
    class Base:
        def a(self) -> int:
            return 1

        @property
        def b(self) -> int:
            return 1

        @abc.abstractmethod
        def c(self) -> int: ...

    class Sub(Base):
        def a(self) -> int:
            return 2

        b = property(lambda self: 2)

        def c(self) -> int:
            return 2

    assert sorted(_overridden(Sub)) == [("Base", "a"), ("Base", "b")]
