"""Resident memory of this process and its peak (Linux). Standard library only: scripts of other environments use it."""

import contextlib
import ctypes
import re
from pathlib import Path


def forget_peak() -> int:
    """Release free memory, reset the peak to what is resident now, and return that in bytes.

    Raises:
      OSError: the system does not provide these figures.
    """
    with contextlib.suppress(OSError, AttributeError):  # with another C library, free memory counts as resident
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the peak of resident memory since `forget_peak`, in bytes.

    Raises:
      OSError: the system does not provide these figures.
    """
    return _status("VmHWM")


def _status(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")
    return 1024 * int(match[1])
