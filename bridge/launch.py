"""Read what launchers say of this process: torchrun, Slurm, Open MPI and Kubernetes describe it in variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from jsae.settings import require

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """A process among those of a run."""

    index: int
    """Its number, from 0."""
    count: int | None
    """Number of processes; None where jax asks the launcher."""
    local_index: int
    """Its number among those on its host."""
    local_count: int
    """Number of processes on its host."""
    coordinator: str | None
    """Address and port of the first process; None: jax finds it."""


def detected(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Return what a launcher says of this process; None where it is the only one.

    Args:
      environment: variables; None: those of this process.

    Raises:
      ConfigError: variables of torchrun that make no sense.
    """
    env = os.environ if environment is None else environment
    if all(name in env for name in _TORCHRUN):
        launch = _of_torchrun(env)
    elif "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
        index, count, local = _numbers(env, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        launch = Launch(index, count, local, int(per_node), None)
    elif "OMPI_COMM_WORLD_SIZE" in env:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        index, count, local, local_count = _numbers(env, *(f"OMPI_COMM_WORLD_{name}" for name in names))
        launch = Launch(index, count, local, local_count, None)
    elif "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and find_spec("kubernetes"):
        return Launch(_numbers(env, "JOB_COMPLETION_INDEX")[0], None, 0, 1, None)
    else:
        return None
    return None if launch.count == 1 else launch


def is_first() -> bool:
    """Return whether this process is the first or only one of a run, which prints for all. Starts nothing."""
    launch = detected()
    return launch is None or launch.index == 0


def _of_torchrun(env: Mapping[str, str]) -> Launch:
    index, count, port = _numbers(env, "RANK", "WORLD_SIZE", "MASTER_PORT")
    local = env.get("LOCAL_RANK", "0"), env.get("LOCAL_WORLD_SIZE", "1")
    require(
        0 <= index < count and 0 < port < 65535 and all(word.isdecimal() for word in local),
        f"RANK={index}, WORLD_SIZE={count}, MASTER_PORT={port}, LOCAL_RANK={local[0]}, LOCAL_WORLD_SIZE={local[1]} "
        "describe no process: start the run with torchrun",
    )
    # torchrun itself listens on the port.
    return Launch(index, count, int(local[0]), int(local[1]), f"{env['MASTER_ADDR']}:{port + 1}")


def _numbers(env: Mapping[str, str], *names: str) -> list[int]:
    for name in names:
        value = env.get(name, "")
        require(value.isdecimal(), f"the variable {name} is {value!r}: a launcher sets it to a number")
    return [int(env[name]) for name in names]


def own_device(wanted: str) -> str:
    """Return the device of this process, before torch or jax starts one.

    On a CPU the processes of torchrun divide the cores of their host, as other launchers do themselves. On GPUs each
    takes the one of its number on its host.

    Args:
      wanted: cpu or cuda; cuda:N in a single process.

    Raises:
      ConfigError: a single GPU for several processes.
    """
    launch = detected()
    if launch is None:
        return wanted
    require(
        ":" not in wanted,
        f"--device={wanted} names one GPU for {launch.count or 'several'} processes: give --device=cuda, and each "
        "takes its own",
    )
    if wanted == "cpu":
        if launch.coordinator is not None:
            _divide_cores(launch)
    elif (launch.local_count > 1 or launch.local_index) and _sees_several():
        return f"{wanted}:{launch.local_index}"
    return wanted


def _divide_cores(launch: Launch) -> None:
    """Keep this process to its share of the cores, before torch and jax start their threads."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // launch.local_count
    if each:
        os.sched_setaffinity(0, cores[launch.local_index * each : (launch.local_index + 1) * each])
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default
        os.environ["OMP_NUM_THREADS"] = str(max(each, 1))


def _sees_several() -> bool:
    """Return whether this process may use several GPUs: a launcher may have left it its own only."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is None or "," in visible
