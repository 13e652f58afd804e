"""Memory of a training step on a GPU: what is promised for the reference size, and what is predicted before a run."""

import concurrent.futures
import contextlib
import json
import sys

import pytest
from card import DEVICE, REHEARSED, environment, show

from bridge.training import memory
from experiments.benches import memory as bench
from experiments.benches import peers
from experiments.benches.shapes import Size, member

pytestmark = pytest.mark.xdist_group("memory")

REFERENCE = Size(96, 1536, 8, 1024) if REHEARSED else Size(1280, 20480, 64, 16384)
MOST = 4 * 2**30
NEAR = 0.2
ARCHITECTURES = ("topk", "batchtopk", "relu", "gated", "jumprelu")


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, dict[str, int]]:
    """Peak memory of processes that take three steps, by architecture, side by side."""
    asks, found = {}, {}
    variables = environment(XLA_PYTHON_CLIENT_PREALLOCATE="false")
    settings = {"size": REFERENCE, "steps": 3, "device": DEVICE, "matmul_dtype": "bfloat16"}
    with contextlib.ExitStack() as running, concurrent.futures.ThreadPoolExecutor() as pool:
        for architecture in ARCHITECTURES:
            folder = tmp_path_factory.mktemp(architecture)
            (folder / "job.json").write_text(json.dumps(settings | {"architecture": architecture}))
            process = peers.process(sys.executable, bench.SCRIPT, folder, variables)
            asks[architecture] = pool.submit(running.enter_context(process)[1], {})
        for architecture, answer in asks.items():
            found[architecture] = answer.result()
            show(f"memory {architecture}", **{name: value / 2**30 for name, value in found[architecture].items()})
    return found


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_step_of_the_reference_size_needs_at_most_4_gib(peaks, architecture):
    assert peaks[architecture]["peak"] <= MOST


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_prediction_is_within_a_fifth_of_what_is_needed(peaks, architecture):
    need = memory.of_steps([member(architecture, REFERENCE, "bfloat16")], saving=False)
    measured = peaks[architecture]["peak"]
    show(f"predicted {architecture}", predicted=need.total / 2**30, measured=measured / 2**30)
    assert abs(need.total / measured - 1) <= NEAR, need
