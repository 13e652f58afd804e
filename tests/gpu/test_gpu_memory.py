"""Memory of a training step on a GPU: what is promised for the reference size, and what is predicted before a run."""

import json
import sys

import pytest
from card import DEVICE, REHEARSED, ROOT, environment, show

from bridge.training import plan
from experiments.benches import memory, peers
from experiments.benches.shapes import Size, member

pytestmark = pytest.mark.xdist_group("memory")

REFERENCE = Size(96, 1536, 8, 1024) if REHEARSED else Size(1280, 20480, 64, 16384)
MOST = 4 * 2**30
NEAR = 0.2


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, dict[str, int]]:
    """Peak memory of processes that take three steps, by architecture, side by side."""
    found = {}
    for architecture in ("topk", "batchtopk", "relu"):
        job = {
            "size": REFERENCE,
            "architecture": architecture,
            "steps": 3,
            "device": DEVICE,
            "matmul_dtype": "bfloat16",
        }
        folder = tmp_path_factory.mktemp(architecture)
        (folder / "job.json").write_text(json.dumps(job))
        variables = environment(XLA_PYTHON_CLIENT_PREALLOCATE="false")
        with peers.process(sys.executable, memory.SCRIPT, folder, variables) as (_, ask):
            found[architecture] = ask({})
        show(f"memory {architecture}", **{name: value / 2**30 for name, value in found[architecture].items()})
    return found


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_step_of_the_reference_size_needs_at_most_4_gib(peaks, architecture):
    assert peaks[architecture]["peak"] <= MOST


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu"])
def test_the_prediction_is_within_a_fifth_of_what_is_needed(peaks, architecture):
    predicted = plan.step_memory([member(architecture, REFERENCE, "bfloat16")]).total + plan.batch_memory(
        REFERENCE.batch, [REFERENCE.d_in]
    )
    measured = peaks[architecture]["peak"]
    show(f"predicted {architecture}", predicted=predicted / 2**30, measured=measured / 2**30)
    assert abs(predicted / measured - 1) <= NEAR
    assert ROOT.is_dir()
