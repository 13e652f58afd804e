"""Train SAEs on the activations of a nanochat, from Python, in one call."""

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from bridge import accelerators
from bridge.run import Run, directory
from bridge.settings import from_keywords
from bridge.training import determinism, device
from bridge.training.config import RunConfig
from jsae import files
from jsae.settings import require

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat
    from bridge.nanochat.corpus import Corpus
    from bridge.training.loop import StopRequests
    from bridge.training.plan import Trainee
    from jsae.loop import Choice


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
    with directory.claimed(run.path, config, map(config.variant_name, config.variants())) as locks:
        _train(run, config, locks, stop_requests)
    return run


def _train(run: Run, config: RunConfig, locks: contextlib.ExitStack, stop_requests: "StopRequests | None") -> None:
    """Train into a directory that this process has locked; `locks` receives the locks of the variants."""
    started = time.perf_counter()
    if config.deterministic:
        determinism.enforce(config.device)
    torch_device = device.open_torch(config.device)
    if config.matmul_dtype == "bfloat16":
        accelerators.require_bfloat16("--matmul_dtype=bfloat16", torch_device)

    import bridge.nanochat
    from bridge.training import loop, plan, text
    from bridge.training.finish import finish

    # The model, the SAEs and the text, each checked before the long training.
    nano = bridge.nanochat.load(config.checkpoint, config.step, torch_device, tokenizer=config.tokenizer)
    trainees = plan.trainees(run.path, config, nano)
    device.open_jax(torch_device, plan.jax_fraction(config, trainees, nano))
    choice = _choose(run, config, trainees)
    plan.check_memory(config, trainees, nano.config.n_embd, plan.available_memory(config), *choice)
    sites = plan.sites(trainees)
    corpus, heldout = text.texts(config, nano)
    _announce(config, nano, trainees, choice)
    rows = text.heldout_rows(config, heldout)
    text.check_activations(config, nano, sites, rows)
    text.check_data(run.path, corpus)
    programs, reason = text.programs(config, nano, corpus, sites)
    ways = {
        "compiled": (None if programs is None else "blocks", reason),
        "operations": (choice.ops.name, choice.reason),
    }
    _record(run, config, trainees, nano, corpus, locks, ways)

    # Training, export and evaluation.
    acts = text.stream(config, nano, corpus, sites, programs)
    states = loop.train(run.path, config, trainees, acts, stop_requests, ops=choice.ops)
    if states is None:
        raise Stopped(run)
    try:
        finish(config, trainees, states, nano, rows, corpus.fingerprint)
        if config.prepare_neuronpedia:
            for folder in dict.fromkeys(trainee.folder for trainee in trainees):
                _prepare_neuronpedia(Run(folder), config, torch_device)
    except KeyboardInterrupt as interrupt:  # SIGTERM too; all of the training is saved
        raise Stopped(run) from interrupt
    print(f"took {time.perf_counter() - started:.0f} s in all")


def _choose(run: Run, config: RunConfig, trainees: list["Trainee"]) -> "Choice":
    """Return the implementation of operations; a resumed run that began without kernels continues without them."""
    from jsae.loop import Choice, choose_ops
    from jsae.ops import Xla

    choice = choose_ops([trainee.member for trainee in trainees])
    resumes = config.resume and run.config_file.is_file()
    if choice.ops.name == "gpu" and resumes and run.facts.get("operations") == "xla":
        return Choice(Xla(choice.ops.matmul_dtype), "the run began with it")
    return choice


def _record(
    run: Run,
    config: RunConfig,
    trainees: list["Trainee"],
    nano: "Nanochat",
    corpus: "Corpus",
    locks: contextlib.ExitStack,
    ways: dict[str, tuple[str | None, str]],
) -> None:
    """Write config.json of the run and of its variants, or check those of a resumed run; lock the variants.

    `ways` has what was chosen by the device, which the numbers depend on, each with the reason: which parts of the
    model are compiled (None if it runs eagerly), and the implementation of operations.
    """
    facts = {"model": nano.fingerprint, "data": corpus.fingerprint, "data_files": corpus.files}
    facts |= {name: chosen for name, (chosen, _) in ways.items()}
    reasons = {name: reason for name, (_, reason) in ways.items()}
    sites = dict.fromkeys(trainee.hooks for trainee in trainees)
    directory.record(run.path, config, facts | {"hook_names": [list(hooks) for hooks in sites]}, reasons)
    for trainee in trainees:
        if trainee.folder != run.path:
            locks.enter_context(files.Lock(trainee.folder))
            directory.record(trainee.folder, trainee.variant, facts, reasons)


def _announce(config: RunConfig, nano: "Nanochat", trainees: list["Trainee"], choice: "Choice") -> None:
    """Print what will be trained, and settings without effect."""
    import jax

    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    if config.device == "cpu" and config.jax_memory_fraction != defaults["jax_memory_fraction"]:
        print("note: --jax_memory_fraction is for GPUs and has no effect with --device=cpu", flush=True)
    latents = trainees[0].member.sae.d_sae
    one = f"an {config.activation}" if config.activation[0] in "aeiou" else f"a {config.activation}"
    saes = f"{one} SAE" if len(trainees) == 1 else f"{len(trainees)} {config.activation} SAEs"
    hooks = ", ".join(dict.fromkeys(trainee.name for trainee in trainees))
    print(
        f"nanochat {config.checkpoint} ({nano.generation}, {nano.config.n_layer} layers of width "
        f"{nano.config.n_embd}), {hooks}: {saes} of {latents} latents from {config.num_activations:,} activations of "
        f"{config.data!r} on {jax.default_backend()}",
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
