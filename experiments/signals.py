"""Being asked to stop, politely."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that stays empty until the process gets SIGTERM or Ctrl-C; what is at hand is finished meanwhile."""
    received: list[int] = []
    kept = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
