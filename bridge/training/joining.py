"""Join the processes of a run: what a launcher says of them, mapped onto jax's distributed runtime."""

from bridge import launch
from bridge.launch import Launch
from jsae.settings import require

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead, and the others end."""
_SHUTDOWN = 60  # seconds that a process waits for the others when it ends


def begin(wanted: str) -> str:
    """Join the processes of the run, if a launcher started several; return the device of this one.

    Must be called before torch and jax start their devices (`bridge.launch.own_device`).

    Args:
      wanted: cpu or cuda; cuda:N in a single process.

    Raises:
      ConfigError: a single GPU for several processes, jax in use already, or processes that do not find each other.
    """
    own, launched = launch.own_device(wanted), launch.detected()
    if launched is not None:
        _join(launched, own)
    return own


def _join(launched: Launch, kind: str) -> None:
    """Start jax's distributed runtime."""
    import jax

    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    options: dict[str, object] = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": _SHUTDOWN}
    if kind != "cpu":
        options["local_device_ids"] = [0]  # of those that CUDA_VISIBLE_DEVICES leaves
    if launched.coordinator is not None:
        options |= {
            "coordinator_address": launched.coordinator,
            "num_processes": launched.count,
            "process_id": launched.index,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**options)  # type: ignore[arg-type]
    except Exception as error:  # of the runtime's own kinds
        line = " ".join(str(error).split())[:300]
        where = launched.coordinator or "the address that jax found"
        require(
            False,
            f"process {launched.index} of {launched.count or 'several'} cannot join the others at {where} ({line}): "
            "all must be started, and the port must be free and reachable",
        )
