"""What every test shares: shape checks switched on, the place of the goldens."""

import gc
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from chromium import browser, visit  # noqa: F401
from jaxtyping import install_import_hook

# Shapes in signatures are enforced here and only here.
install_import_hook(["jsae", "bridge"], "beartype.beartype")

# Four devices on one processor, so that the sharded step is a real one.
jax.config.update("jax_num_cpu_devices", 4)

# Tiny models on one thread: threads that wait for each other cost minutes as soon as another process wants a core.
torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_module() -> Iterator[None]:
    """Free what a module compiled.

    Every program that jax compiles for the processor holds memory mappings. Those of the whole suite together exceed
    the kernel's limit for one process (vm.max_map_count, 65,530), and then the compiler crashes.
    """
    yield
    jax.clear_caches()
    gc.collect()


SHARED = Path(__file__).resolve().parents[2] / "shared"


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
