"""Check names of devices, and whether torch can use them."""

import re

from jsae.settings import require

_NAME = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


def check_name(device: str) -> None:
    """Check the name of a device, not whether it exists.

    Raises:
      ConfigError: the name is not cpu, cuda or cuda:N.
    """
    require(
        _NAME.fullmatch(device) is not None,
        f"device is {device!r}: it must be cpu or cuda, or cuda:N for one of several GPUs",
    )


def require_torch(device: str, called: str | None = None) -> None:
    """Check that torch can use a device; imports torch unless it is the CPU.

    Args:
      device: cpu, cuda or cuda:N.
      called: the user's name for the device, for messages; None is `device`.

    Raises:
      ConfigError: torch does not have the device; says which ones it has.
    """
    check_name(device)
    if device == "cpu":
        return
    import torch

    flag = f"--device={called or device}"
    require(torch.cuda.is_available(), f"{flag}: torch sees no GPU here; use --device=cpu")
    count, number = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    present = ", ".join(f"cuda:{i}" for i in range(count))
    require(number < count, f"{flag}: torch sees {count} GPU{'s' * (count > 1)} here, {present}")
