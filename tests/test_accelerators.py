"""What is said of GPUs that cannot be used, from what torch, the driver and pip would say of them."""

import importlib.metadata
import types

import pytest
import torch

from bridge import accelerators
from bridge.accelerators import Seen, check_plugins, require_bfloat16, require_torch, why_jax_has_no_gpu
from jsae.settings import ConfigError

GIB = 2**30
H100 = Seen("2.11.0", "13.0", 1, "", "NVIDIA H100", (9, 0), 78 * GIB, 80 * GIB)
OLD = "The NVIDIA driver on your system is too old (found version 11040)"


def refused(seen: Seen, device: str = "cuda") -> str:
    with pytest.raises(ConfigError) as error:
        require_torch(device, look=lambda number: seen)
    (line,) = str(error.value).splitlines()
    return line


def test_a_gpu_with_free_memory_is_used():
    require_torch("cuda", look=lambda number: H100)
    require_torch("cpu", look=None)


def test_a_torch_without_cuda_is_named():
    told = refused(Seen("2.13.0+cpu", None))
    assert told.startswith("--device=cuda: torch sees no GPU here; use --device=cpu")
    assert "torch 2.13.0+cpu is built without CUDA: install a CUDA build of torch" in told


def test_a_driver_that_is_too_old_is_named_with_what_to_do():
    told = refused(Seen("2.11.0", "13.0", reason=OLD))
    assert f"({OLD}; update the driver, or install a torch for an older CUDA than 13.0)" in told


def test_a_missing_driver_is_named():
    assert "(Found no NVIDIA driver on your system)" in refused(
        Seen("2.11.0", "13.0", reason="Found no NVIDIA driver on your system")
    )


def test_a_gpu_that_is_busy_or_full_is_named():
    busy = "CUDA error: all CUDA-capable devices are busy or unavailable"
    assert busy in refused(Seen("2.11.0", "13.0", 1, busy))
    told = refused(Seen("2.11.0", "13.0", 1, "", "NVIDIA H100", (9, 0), GIB // 5, 80 * GIB))
    assert "only 0.2 of the 80.0 GiB of the NVIDIA H100 are free: another process holds the rest" in told
    assert "cuda:N" in told


def test_a_number_that_is_not_there_is_refused_with_those_that_are():
    assert "torch sees 2 GPUs here, cuda:0, cuda:1" in refused(Seen("2.11.0", "13.0", 2), "cuda:7")


class Properties:
    """A driver that answers, warns or raises, in the place of torch.cuda."""

    def __init__(self, monkeypatch, count: int = 1, error: str = "", warning: str = ""):
        def device_count() -> int:
            return count

        def is_available() -> bool:
            if warning:
                import warnings

                warnings.warn(f"CUDA initialization: {warning} (Triggered internally at x.cpp:1.)", stacklevel=1)
            return count > 0

        def mem_get_info(number: int) -> tuple[int, int]:
            if error:
                raise RuntimeError(error)
            return 78 * GIB, 80 * GIB

        properties = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "device_count", device_count)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
        monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_what_torch_says_is_collected(monkeypatch):
    Properties(monkeypatch)
    seen = accelerators._look(0)
    assert (seen.count, seen.name, seen.capability, seen.free) == (1, "NVIDIA H100", (9, 0), 78 * GIB)
    assert accelerators._look(3).count == 1


def test_an_error_of_the_driver_is_its_first_sentence(monkeypatch):
    Properties(
        monkeypatch, error="CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported. Pass"
    )
    assert accelerators._look(0).reason == "CUDA error: out of memory"


def test_a_warning_of_an_old_driver_is_the_reason_and_not_shown(monkeypatch):
    Properties(monkeypatch, count=0, warning=f"{OLD}. Please update your GPU driver.")
    assert accelerators._look(0).reason == OLD
    assert "update the driver" in refused(accelerators._look(0))


# ---- bfloat16 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "does"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_begins_with_compute_capability_8(monkeypatch, capability, does):
    Properties(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert accelerators.computes_in_bfloat16("cuda") is does
    if does:
        require_bfloat16("--matmul_dtype=bfloat16", "cuda")
        return
    with pytest.raises(ConfigError, match=r"--matmul_dtype=bfloat16: the Tesla V100 .* has no bfloat16.* use float32"):
        require_bfloat16("--matmul_dtype=bfloat16", "cuda")


def test_a_processor_is_asked_for_no_bfloat16():
    require_bfloat16("--matmul_dtype=bfloat16", "cpu")
    assert not accelerators.computes_in_bfloat16("cpu")


# ---- jax -----------------------------------------------------------------------------------------------------------


def test_a_plugin_for_torchs_cuda_is_accepted_also_beside_another():
    check_plugins("--device=cuda", {13: "0.11.2"}, "13.0")
    check_plugins("--device=cuda", {12: "0.11.2", 13: "0.11.2"}, "13.0")
    check_plugins("--device=cuda", {12: "0.11.2"}, None)
    check_plugins("--device=cuda", {}, "13.0")


def test_a_plugin_for_another_cuda_than_torchs_is_refused_before_jax_starts():
    with pytest.raises(ConfigError, match=r"torch is built for CUDA 13\.0, and jax's plugin is for CUDA 12") as error:
        check_plugins("--device=cuda", {12: "0.11.2"}, "13.0")
    assert "install jax-cuda13-plugin" in str(error.value)


def test_a_missing_or_stale_plugin_is_the_reason_with_the_command_that_installs_it():
    assert why_jax_has_no_gpu({}, "0.11.2", "12.8", "no backend") == (
        "its CUDA plugin is not installed: pip install jax-cuda12-plugin==0.11.2"
    )
    told = why_jax_has_no_gpu({13: "0.10.0"}, "0.11.2", "13.0", "no backend")
    assert told == "jax-cuda13-plugin 0.10.0 is not for jax 0.11.2: pip install jax-cuda13-plugin==0.11.2"
    told = why_jax_has_no_gpu({13: "0.11.2"}, "0.11.2", "13.0", "Unable to initialize backend 'cuda': no driver\nmore")
    assert told.startswith("Unable to initialize backend 'cuda': no driver: an old driver")
    assert "\n" not in told


def test_plugins_are_found_by_the_names_of_their_packages(monkeypatch):
    def version(name: str) -> str:
        if name != "jax-cuda13-plugin":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.11.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert accelerators.jax_plugins() == {13: "0.11.2"}
