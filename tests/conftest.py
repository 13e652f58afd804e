"""Setup shared by all tests: shape checks, tiers, the folder of the goldens."""

import atexit
import gc
import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tiers
import torch
from chromium import browser, visit  # noqa: F401
from jaxtyping import install_import_hook

# Shapes in signatures are enforced here and only here.
install_import_hook(["jsae", "bridge"], "beartype.beartype")


class KernelFinder(importlib.machinery.PathFinder):
    """Import Triton kernels as they stand: triton compiles their source, which must not be decorated."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        """Find modules of kernels only."""
        return super().find_spec(name, path, target) if name.endswith("_kernels") else None


sys.meta_path.insert(0, KernelFinder)

# Four devices on one processor, so that the sharded step is a real one.
jax.config.update("jax_num_cpu_devices", 4)

# Tiny models on one thread: threads that wait for each other cost minutes as soon as another process wants a core.
torch.set_num_threads(1)

# The commands that tests start compile the same few programs again and again: they share them through a folder that
# ends with the session. This process is not part of it, so that its programs are compiled as a user's are.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a worker of pytest-xdist has its parent's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jsae-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", None)

# A shell's background jobs ignore Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Keep jax to the processor, or, where the GPU tier is asked for, end the session unless there is a GPU."""
    if tiers.wants_gpu(config.option.markexpr):
        tiers.require_gpu()
    else:
        jax.config.update("jax_platforms", "cpu")
        compile_quickly()
        # Read when triton is imported, which torch does where a test compiles a model.
        os.environ["TRITON_INTERPRET"] = "1"


def compile_quickly() -> None:
    """Compile the small programs of this process without XLA's newer emitters of fusions, in half the time.

    XLA reads its flags once, and ends the process if it does not know one; commands that tests start get none.
    """
    if "XLA_FLAGS" not in os.environ and jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
        jax.devices()
        del os.environ["XLA_FLAGS"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave modules unread of which a tier has nothing: their imports would take as long as its tests."""
    if tiers.wants_gpu(config.option.markexpr):
        return True if collection_path.suffix == ".py" and not tiers.is_gpu(collection_path) else None
    quick = config.option.markexpr == "not slow"
    unread = tiers.is_gpu(collection_path) or (quick and collection_path.stem in tiers.MODULES)
    return True if unread else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, and put their modules first: the longest must not begin when all others have ended."""
    tiers.mark(items)
    items.sort(key=tiers.place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Keep the promise of the quick tier: its tests start no process."""
    if item.get_closest_marker("slow"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", tiers.refuse)
        return (yield)


def pytest_collection_finish() -> None:
    """Leave what exists by now, which stays to the end, out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def quickly_compiled() -> Iterator[None]:
    """Compile without expensive optimisations: for modules that compile many programs and run each a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_module() -> Iterator[None]:
    """Free what modules compiled, before it is too much.

    Every program that jax compiles for the processor holds memory mappings. Those of the whole suite together exceed
    the kernel's limit for one process (vm.max_map_count, 65,530), and then the compiler crashes.
    """
    yield
    if not MAPPINGS.is_file() or MAPPINGS.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()
        gc.collect()


_ROOT = Path(__file__).resolve().parents[1]
SHARED = next(filter(Path.is_dir, (_ROOT.parent / "shared", _ROOT / "shared")), _ROOT.parent / "shared")
"""Reference material beside the clone, or within it on a machine that only the clone was copied to."""


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of outputs of upstream's own code; skips, with the reason, in a clone without it."""
    folder = SHARED / "nanochat" / "goldens"
    if not folder.is_dir():
        pytest.skip(f"no goldens: {folder} does not exist in this clone")
    return folder


@pytest.fixture(scope="session")
def foreign() -> Path:
    """The folder of checkpoints in other formats; skips, with the reason, in a clone without it."""
    folder = SHARED / "nanochat" / "foreign"
    if not folder.is_dir():
        pytest.skip(f"no foreign checkpoints: {folder} does not exist; test_nanochat_formats.py makes its own")
    return folder


@pytest.fixture(scope="session")
def neuronpedia_reference() -> dict[str, Any]:
    """Neuronpedia's formats as JSON Schemas, by file; skips, with the reason, in a clone without them."""
    file = SHARED / "reference" / "neuronpedia.schema.json"
    if not file.is_file():
        pytest.skip(f"no reference: {file} does not exist in this clone; tests/neuronpedia_schema.py is held to anyway")
    return json.loads(file.read_text(encoding="utf-8"))["$defs"]
