"""What `--deterministic` sets for torch and XLA, before either of them starts a GPU."""

import os
import sys
import types

import pytest
import torch

from bridge.training import determinism
from bridge.training.determinism import XLA, enforce, merged


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Restore the process's settings."""
    for name in (*determinism.VARIABLES, "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_gpu_run_leaves_no_choice_to_timing_and_no_order_to_atomics():
    enforce("cuda:1")
    assert os.environ["XLA_FLAGS"].split() == list(XLA)
    assert "--xla_gpu_deterministic_ops=true" in XLA
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_cpu_run_is_left_alone():
    enforce("cpu")
    assert "XLA_FLAGS" not in os.environ
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_dump_to=/tmp/x")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    enforce("cuda")
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_gpu_enable_triton_gemm=true",
        "--xla_dump_to=/tmp/x",
        "--xla_gpu_deterministic_ops=true",
    ]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_flags_are_told_apart_by_their_whole_name():
    assert merged("--xla_a_b=1", ("--xla_a=2",)) == "--xla_a_b=1 --xla_a=2"
    assert merged("xla_a=1", ("--xla_a=2",)) == "xla_a=1"


def test_a_process_that_already_computes_on_a_gpu_is_told_that_it_is_too_late(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", types.SimpleNamespace(_backends={"cuda": object()}))
    enforce("cuda")
    assert "train in a new process" in capsys.readouterr().err


def test_a_second_run_of_the_same_process_is_not_warned(monkeypatch, capsys):
    enforce("cuda")
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", types.SimpleNamespace(_backends={"cuda": object()}))
    enforce("cuda")
    assert capsys.readouterr().err == ""
