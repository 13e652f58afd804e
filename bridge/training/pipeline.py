"""Train SAEs on the activations of a nanochat, from Python, in one call."""

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge import accelerators, launch
from bridge.run import Run, directory
from bridge.settings import from_keywords
from bridge.training import determinism, device, joining
from bridge.training.config import RunConfig
from jsae import files
from jsae.config import RECIPE
from jsae.jsons import is_finite
from jsae.settings import require

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from bridge.nanochat import Nanochat
    from bridge.training.continuing import Starts
    from bridge.training.loop import StopRequests
    from bridge.training.origins import Origin
    from bridge.training.plan import Trainee
    from jsae.loop import Choice


_SEEN_WITHIN = 60  # seconds after which a file of another host must be seen


class Stopped(Exception):  # noqa: N818 - not an error: the run is saved
    """A run was asked to stop; its training is saved. Train it again with `resume=True` to continue.

    Args:
      run: the run.
    """

    def __init__(self, run: Run):
        super().__init__(f"the run in {run.path} was asked to stop and is saved: resume=True continues it")
        self.run = run


def train(config: RunConfig | None = None, *, stop_requests: "StopRequests | None" = None, **settings: Any) -> Run:
    """Train, export and measure SAEs on the activations of a nanochat.

        run = bridge.train(checkpoint="demo", k=16, num_activations=2_000_000, output_dir="runs/mine")
        print(run.evaluation, run.sae())

    Ctrl-C during training ends it as any exception does: the last checkpoint is kept, and `resume=True` continues.

    Args:
      config: all settings of the run.
      stop_requests: returns a context manager that is entered while steps are taken; what it yields becomes true when
        the run should be saved and stopped. None never stops it.
      settings: fields of `RunConfig` instead of a config, as `bridge.settings.from_keywords` takes them: a field of
        several values also takes a single one (`k=16`).

    Returns:
      The run, with its exported SAEs and their metrics. For a sweep, `Run.variants` lists the runs within it.

    Raises:
      ConfigError: settings that cannot work, data of another run, or a directory that holds another run.
      Stopped: it was asked to stop and is saved, or interrupted after the training.
      FileNotFoundError, ValueError: a checkpoint or text that does not exist or cannot be read.
      FloatingPointError: activations or losses that are not finite, or a run that diverged.
      UnusableError: exported SAEs that are of no use; they are kept, and marked.
      LockedError: another process writes to the directory.
    """
    require(config is None or not settings, f"give a config or settings, not both: {', '.join(settings)}")
    config = from_keywords(RunConfig, settings) if config is None else config
    require(
        isinstance(config, RunConfig),
        f"config is {config!r:.80}: give a RunConfig, or settings by name, as in train(checkpoint=..., k=...)",
    )
    run = Run(config.output_dir)
    own_device = joining.begin(
        config.device
    )  # first of all: a process that ends is noticed by those that it has joined
    if launch.is_first():
        with directory.claimed(run.path, config, map(config.variant_name, config.variants())) as locks:
            _train(run, config, own_device, locks, stop_requests)
    else:
        with silence(), contextlib.ExitStack() as locks:
            _train(run, config, own_device, locks, stop_requests)
    return run


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Print nothing within the context: the first process prints for all."""
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


class _Prepared(NamedTuple):
    """The parts of a run, checked before the training."""

    trainees: list["Trainee"]
    mesh: "Mesh | None"
    choice: "Choice"
    origin: "Origin"
    starts: "Starts | None"


class _Asking(contextlib.ExitStack):
    """Requests to stop, from the first step of a training until this context is left, so that none interrupts what all
    processes do together at its end.

    Args:
      stop_requests: see `loop.StopRequests`; None: requests are not received.
    """

    def __init__(self, stop_requests: "StopRequests | None"):
        super().__init__()
        self._stop_requests = stop_requests
        self._received: Collection[object] = ()

    def requests(self) -> contextlib.AbstractContextManager[Collection[object]]:
        """Return a context that yields the requests; they are received beyond it."""
        if self._stop_requests is not None:
            self._received = self.enter_context(self._stop_requests())
        return contextlib.nullcontext(self._received)

    def late(self) -> bool:
        """Return whether requests were received; after the training: since it has looked for the last time."""
        return bool(self._received)


def _train(
    run: Run, config: RunConfig, own_device: str, locks: contextlib.ExitStack, stop_requests: "StopRequests | None"
) -> None:
    """Train into a directory that the first process has locked; `locks` receives the locks of the variants."""
    started = time.perf_counter()
    if config.deterministic:
        determinism.enforce(own_device)
    torch_device = device.open_torch(own_device)
    if config.matmul_dtype == "bfloat16":
        accelerators.require_bfloat16("--matmul_dtype=bfloat16", torch_device)

    from bridge.training import loop, plan
    from bridge.training.finish import finish, finished
    from jsae import processes

    with processes.connected():
        parts = _prepare(run, config, torch_device)
        origin = parts.origin
        shards = loop.Shards(tuple(origin.own_shards), origin.data_shards)
        given: dict[str, Any] = {"ops": parts.choice.ops, "mesh": parts.mesh, "shards": shards, "starts": parts.starts}
        source = origin.source(plan.sites(parts.trainees))
        if config.find_lr:
            parts = parts._replace(trainees=_with_rates(run, config, parts, source, given))
        processes.on_first(lambda: _record(run, config, parts, locks))
        _check_shared(run)
        with _Asking(stop_requests) as asking:
            states = loop.train(run.path, config, parts.trainees, source, asking.requests, **given)
            if states is None:
                raise Stopped(run)
            saes = finished(states)

        def complete() -> None:
            finish(config, parts.trainees, saes, origin)
            if config.prepare_neuronpedia:
                for folder in dict.fromkeys(trainee.folder for trainee in parts.trainees):
                    _prepare_neuronpedia(Run(folder), config, torch_device)

        try:
            processes.on_first(complete, interrupted=asking.late())
        except KeyboardInterrupt as interrupt:  # SIGTERM too; all of the training is saved
            raise Stopped(run) from interrupt
    print(f"took {time.perf_counter() - started:.0f} s in all")


def _prepare(run: Run, config: RunConfig, torch_device: str) -> _Prepared:
    """Load the model or open the store, and plan the SAEs, each checked before the long training, in all processes."""
    import bridge.nanochat
    from bridge.stages import loading
    from bridge.training import continuing, plan
    from bridge.training.origins import StoreOrigin, TextOrigin
    from jsae import processes
    from jsae.store import Store

    store = starts = None
    nanos: list[Nanochat] = []
    trainees: list[Trainee] = []
    fraction, failure = 0.1, None
    try:
        starts = continuing.find(run, config)
        if config.activations is None:
            if config.stages:
                nanos = loading.load(config.stages, torch_device, config.tokenizer, config.models_in_memory)
            else:
                given = (config.checkpoint, config.step, torch_device)
                nanos = [bridge.nanochat.load(*given, tokenizer=config.tokenizer)]
            trainees = plan.trainees(run.path, config, nanos[0], starts)
        else:
            store = Store(config.activations)
            trainees = plan.stored_trainees(run.path, config, store, starts)
        fraction = plan.jax_fraction(config, plan.at_once(config, trainees), nanos[0] if nanos else None)
    except Exception as error:
        if launch.detected() is None:
            raise
        failure = error
    device.open_jax(torch_device, fraction)
    with processes.together():
        if failure is not None:
            raise failure
        mesh = plan.mesh(config, trainees)
        choice = _choose(run, config, trainees, mesh)
        width = max(trainee.member.sae.d_in // trainee.member.sae.layers for trainee in trainees)
        plan.check_memory(config, plan.at_once(config, trainees), width, plan.available_memory(config), *choice)
        sites, data_shards = plan.sites(trainees), _data_shards(run, config)
        origin: Origin = (
            TextOrigin(config, nanos, sites, data_shards)
            if nanos
            else StoreOrigin(config, store, sites, torch_device, data_shards)
        )
        _announce(config, origin, trainees, choice, mesh)
    if starts is not None:
        origin.facts |= starts.facts(trainee.name for trainee in trainees)
    identity = [config.to_json(), origin.facts, choice.ops.name, directory.versions()]
    processes.check_same("settings, model, data, device or versions", identity)
    return _Prepared(trainees, mesh, choice, origin, starts)


def _with_rates(run: Run, config: RunConfig, parts: _Prepared, source: Any, given: dict[str, Any]) -> list["Trainee"]:
    """Return the SAEs with the learning rates that were found, or that a resumed run has found; add them to the facts.

    Raises:
      ConfigError: the record of a resumed run has none.
      NotFiniteError: no rate trains with a finite loss.
    """
    from bridge.training import loop

    if config.resume and run.config_file.is_file():
        found = run.facts.get("find_lr")
        valid = isinstance(found, dict) and all(
            isinstance(found.get(trainee.label), dict) and is_finite(found[trainee.label].get("rate"))
            for trainee in parts.trainees
        )
        require(valid, f"{run.config_file} does not say which learning rates the run found: start a new one")
    else:
        print("finding the learning rate: short runs at several rates", flush=True)
        sweeps = loop.find_rates(config, parts.trainees, source, **given)
        found = {trainee.label: sweep.to_json() for trainee, sweep in zip(parts.trainees, sweeps, strict=True)}
        for trainee, sweep in zip(parts.trainees, sweeps, strict=True):
            print(f"{trainee.label}\n{sweep}", flush=True)
    parts.origin.facts |= {"find_lr": found}
    return [trainee.with_rate(found[trainee.label]["rate"]) for trainee in parts.trainees]


def _check_shared(run: Run) -> None:
    """Check that all processes see the directory of the run.

    Raises:
      ConfigError: one does not, which `OtherProcessError` says in the others.
    """
    from jsae import processes

    with processes.together():
        until = time.monotonic() + _SEEN_WITHIN
        while not run.config_file.is_file() and time.monotonic() < until:  # a network's file system may be late
            time.sleep(0.5)
        require(
            run.config_file.is_file(),
            f"{run.path} of the first process does not exist on {socket.gethostname()}: give an --output_dir on a file "
            "system that all hosts share",
        )


def _choose(run: Run, config: RunConfig, trainees: list["Trainee"], mesh: "Mesh | None" = None) -> "Choice":
    """Return the implementation of operations; a resumed run that began without kernels continues without them."""
    from jsae.loop import Choice, choose_ops
    from jsae.ops import Xla

    choice = choose_ops([trainee.member for trainee in trainees], mesh)
    resumes = config.resume and run.config_file.is_file()
    if choice.ops.name == "gpu" and resumes and run.facts.get("operations") == "xla":
        return Choice(Xla(choice.ops.matmul_dtype), "the run began with it")
    return choice


def _data_shards(run: Run, config: RunConfig) -> int | None:
    """Return the number of parts of text and batches that was given, or that a resumed run has; None: choose it."""
    if config.resume and run.config_file.is_file():
        return run.facts.get("data_shards", 1)
    return config.data_shards


def _record(run: Run, config: RunConfig, parts: _Prepared, locks: contextlib.ExitStack) -> None:
    """Write config.json of the run and of its variants, or check those of a resumed run; lock the variants.

    Recorded is also what was chosen by the device, which the numbers depend on, each with the reason: which parts of
    the model are compiled (None if it runs eagerly), and the implementation of operations.
    """
    trainees, choice, origin = parts.trainees, parts.choice, parts.origin
    ways = {"compiled": origin.compiled, "operations": (choice.ops.name, choice.reason)}
    facts = origin.facts | {"data_shards": origin.data_shards, "recipe": RECIPE}
    facts |= {name: chosen for name, (chosen, _) in ways.items()}
    reasons = {name: reason for name, (_, reason) in ways.items()}
    sites = dict.fromkeys(trainee.hooks for trainee in trainees)
    directory.record(run.path, config, facts | {"hook_names": [list(hooks) for hooks in sites]}, reasons)
    for trainee in trainees:
        if trainee.folder != run.path:
            locks.enter_context(files.Lock(trainee.folder))
            directory.record(trainee.folder, trainee.variant, facts, reasons)


def _announce(
    config: RunConfig, origin: "Origin", trainees: list["Trainee"], choice: "Choice", mesh: "Mesh | None"
) -> None:
    """Print what will be trained, and settings without effect."""
    import jax

    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    if config.device == "cpu" and config.jax_memory_fraction != defaults["jax_memory_fraction"]:
        print("note: --jax_memory_fraction is for GPUs and has no effect with --device=cpu", flush=True)
    latents = trainees[0].member.sae.d_sae
    one = f"an {config.activation}" if config.activation[0] in "aeiou" else f"a {config.activation}"
    kind = "crosscoder" if config.crosscoder or config.stages else "SAE"
    saes = f"{one} {kind}" if len(trainees) == 1 else f"{len(trainees)} {config.activation} {kind}s"
    hooks = ", ".join(dict.fromkeys(trainee.name for trainee in trainees))
    print(
        f"{origin.name}, {hooks}: {saes} of {latents} latents from {config.num_activations:,} activations on "
        f"{jax.default_backend()}",
        flush=True,
    )
    for start in dict.fromkeys(trainee.start for trainee in trainees if trainee.start is not None):
        print(f"continues {start.path}, {start.kind}", flush=True)
        if start.note is not None:
            print(f"note: {start.note}", flush=True)
    if mesh is not None:
        data, shards = mesh.devices.shape
        print(f"{mesh.size} processes: {data} divide the batch, times {shards} that divide the latents", flush=True)
        if shards == 1 and latents > config.batch_size:
            print(
                f"note: {latents:,} latents are more than a batch of {config.batch_size:,} tokens: a larger "
                "--latent_shards would send less between the processes",
                flush=True,
            )
    if config.device != "cpu":
        print(f"steps use the implementation {choice.ops.name!r}: {choice.reason}", flush=True)


def _prepare_neuronpedia(run: Run, config: RunConfig, torch_device: str) -> None:
    """Gather records of a run and write its export for Neuronpedia, with the defaults of `explore` and `export`."""
    from bridge import formats
    from bridge.exploration import Extent, explore, of_run
    from bridge.neuronpedia import sources

    explore(of_run(run, torch_device), Extent(), show_progress=True)
    wanted = sources.Wanted(model_id=config.model_id, source_set=config.source_set)
    for written in formats.write(run, sources.of_run(run.path, wanted)):
        print(written, flush=True)
