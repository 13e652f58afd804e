"""How much memory this process has and had (Linux). Standard library only: scripts of other environments import it."""

import contextlib
import ctypes
import re
from pathlib import Path


def forget_peak() -> int:
    """Gives back what is free, lets the peak start anew from what is resident now, and tells that, in bytes.

    Raises:
      OSError: the system keeps no such figures.
    """
    with contextlib.suppress(OSError, AttributeError):  # in another C library free memory counts as resident
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most that was resident since `forget_peak`, in bytes.

    Raises:
      OSError: the system keeps no such figures.
    """
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")
    return 1024 * int(found[1])
