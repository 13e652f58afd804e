"""Check names of devices, and whether torch and jax can use them.

What torch and its driver say is collected first and judged then, so that every judgement can be tested without a GPU.
"""

import dataclasses
import importlib.metadata
import re
import warnings
from collections.abc import Callable

from jsae.settings import require

_NAME = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
_LEAST_FREE = 2**29
"""Bytes that must be free for a model of any use beside what CUDA takes."""
_BFLOAT16 = 8
"""Least major compute capability of NVIDIA GPUs that multiply in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """Properties of the GPUs by torch and the driver."""

    torch: str
    """Version of torch."""
    cuda: str | None
    """Version of CUDA that torch was built for; None without."""
    count: int = 0
    """GPUs that torch can use."""
    reason: str = ""
    """Why torch can use none, in its own words."""
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    free: int = 0
    total: int = 0
    """Name, compute capability and bytes of memory of the GPU that was asked for."""


def check_name(device: str) -> None:
    """Check the name of a device, not whether it exists.

    Raises:
      ConfigError: the name is not cpu, cuda or cuda:N.
    """
    require(
        _NAME.fullmatch(device) is not None,
        f"device is {device!r}: it must be cpu or cuda, or cuda:N for one of several GPUs",
    )


def require_torch(device: str, called: str | None = None, look: Callable[[int], Seen] | None = None) -> None:
    """Check that torch can use a device; imports torch unless it is the CPU.

    Args:
      device: cpu, cuda or cuda:N.
      called: the user's name for the device, for messages; None is `device`.
      look: returns what is seen of the GPU with a number; None asks torch.

    Raises:
      ConfigError: torch cannot use the device: it has none, not this one, or none of its memory is free.
    """
    check_name(device)
    if device == "cpu":
        return
    flag, number = f"--device={called or device}", int(device.partition(":")[2] or 0)
    seen = (look or _look)(number)
    require(seen.count > 0, f"{flag}: torch sees no GPU here; use --device=cpu{_why_none(seen)}")
    present = ", ".join(f"cuda:{i}" for i in range(seen.count))
    require(number < seen.count, f"{flag}: torch sees {seen.count} GPU{'s' * (seen.count > 1)} here, {present}")
    require(not seen.reason, f"{flag}: the GPU cannot be used: {seen.reason}")
    require(
        seen.free >= _LEAST_FREE,
        f"{flag}: only {seen.free / 2**30:.1f} of the {seen.total / 2**30:.1f} GiB of the {seen.name} are free: "
        "another process holds the rest (nvidia-smi names it); end it, wait for it, or choose another GPU with cuda:N",
    )


def _why_none(seen: Seen) -> str:
    """Return why torch has no GPU and what to do, to be added to the sentence that says so."""
    if seen.cuda is None:
        return f" (torch {seen.torch} is built without CUDA: install a CUDA build of torch to use a GPU)"
    advice = ""
    if "driver" in seen.reason and "old" in seen.reason:
        advice = f"; update the driver, or install a torch for an older CUDA than {seen.cuda}"
    return f" ({seen.reason}{advice})" if seen.reason else ""


def _look(number: int) -> Seen:
    """Ask torch."""
    import torch

    version = {"torch": str(torch.__version__), "cuda": torch.version.cuda}
    with warnings.catch_warnings(record=True) as caught:  # of a driver that is too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        reasons = [_first_line(str(warning.message).partition("CUDA initialization: ")[2]) for warning in caught]
        return Seen(**version, reason=next(filter(None, reasons), "") or _initialisation_error())
    if number >= count:
        return Seen(**version, count=count)
    try:
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:  # busy, out of memory, or not usable by this build of torch
        return Seen(**version, count=count, reason=_first_line(str(error)))
    capability = (properties.major, properties.minor)
    return Seen(**version, count=count, name=properties.name, capability=capability, free=free, total=total)


def _initialisation_error() -> str:
    """Return why CUDA cannot start, in torch's words."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(str(error))
    return ""


def _first_line(text: str) -> str:
    """Return the first sentence of an error, without a full stop."""
    line = text.strip().partition("\n")[0]
    return re.split(r"\.\s+(?=[A-Z])", line)[0].rstrip(".")[:300]


def computes_in_bfloat16(device: str) -> bool:
    """Return whether torch's GPU multiplies matrices in bfloat16: NVIDIA's do from Ampere on; on a CPU False."""
    if device.partition(":")[0] != "cuda":
        return False
    import torch

    return torch.cuda.get_device_capability(device)[0] >= _BFLOAT16


def require_bfloat16(flag: str, device: str) -> None:
    """Check that a GPU multiplies in bfloat16, which a flag asks for; a CPU does it slowly.

    Raises:
      ConfigError: it does not.
    """
    if device.partition(":")[0] != "cuda" or computes_in_bfloat16(device):
        return
    import torch

    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    require(
        False,
        f"{flag}: the {name} (compute capability {capability[0]}.{capability[1]}) has no bfloat16, which begins with "
        f"{_BFLOAT16}.0: use float32",
    )


# ---- jax -------------------------------------------------------------------------------------------------------------


def jax_plugins() -> dict[int, str]:
    """Return the versions of jax's CUDA plugins that are installed, by the major version of CUDA that they are for."""
    found = {}
    for major in range(11, 20):
        try:
            found[major] = importlib.metadata.version(f"jax-cuda{major}-plugin")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_plugins(flag: str, plugins: dict[int, str], torch_cuda: str | None) -> None:
    """Check that jax's plugin is for the CUDA of torch: libraries of two CUDAs in one process replace each other.

    Args:
      flag: what the user gave, for messages.
      plugins: `jax_plugins()`.
      torch_cuda: version of CUDA that torch was built for; None where torch is not used.

    Raises:
      ConfigError: all plugins are for another CUDA.
    """
    if torch_cuda is None or not plugins:
        return
    major = int(torch_cuda.partition(".")[0])
    others = " and ".join(f"CUDA {other} (jax-cuda{other}-plugin {version})" for other, version in plugins.items())
    require(
        major in plugins,
        f"{flag}: torch is built for CUDA {torch_cuda}, and jax's plugin is for {others}: pip uninstall it, and "
        f"install jax-cuda{major}-plugin (docs/guides/gpu.md)",
    )


def why_jax_has_no_gpu(plugins: dict[int, str], jax_version: str, torch_cuda: str | None, error: str) -> str:
    """Return why jax has no GPU where torch has one, and what to do.

    Args:
      plugins: `jax_plugins()`.
      jax_version: version of jax.
      torch_cuda: version of CUDA that torch was built for; None if unknown.
      error: what jax said.
    """
    major = torch_cuda.partition(".")[0] if torch_cuda else "13"
    if not plugins:
        return f"its CUDA plugin is not installed: pip install jax-cuda{major}-plugin=={jax_version}"
    stale = [f"jax-cuda{cuda}-plugin {version}" for cuda, version in plugins.items() if version != jax_version]
    if len(stale) == len(plugins):
        return f"{stale[0]} is not for jax {jax_version}: pip install jax-cuda{major}-plugin=={jax_version}"
    return f"{_first_line(error)}: an old driver, or another LD_LIBRARY_PATH than its CUDA libraries need"
