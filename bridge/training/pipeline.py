"""Train SAEs on the activations of a nanochat, from Python, in one call."""

import contextlib
import dataclasses
import difflib
import time
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.run import Run, directory
from bridge.training import device
from bridge.training.config import RunConfig
from jsae import files
from jsae.settings import ConfigError

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat
    from bridge.training.loop import StopRequests
    from bridge.training.plan import Trainee


class Stopped(Exception):  # noqa: N818 - not an error: the run is saved
    """A run was asked to stop, saved its state, and can be resumed."""


def train(config: RunConfig | None = None, *, stop_requests: "StopRequests | None" = None, **settings: Any) -> Run:
    """Train, export and measure SAEs on the activations of a nanochat.

        run = bridge.train(checkpoint="demo", k=16, num_activations=2_000_000, output_dir="runs/mine")

    Args:
      config: all settings of the run.
      stop_requests: a context manager that is entered while steps are taken; what it yields becomes true when the run
        is to stop. None never stops it.
      settings: instead of a config, fields of `RunConfig`; one value will do where a field takes several.

    Returns:
      The run, with its exported SAEs and their metrics. Of a sweep, `Run.variants` lists the runs within it.

    Raises:
      ConfigError: settings that cannot work, data of another run, or a directory that holds another run.
      Stopped: it was asked to stop; its state is saved, and the same settings with `resume=True` go on.
      FileNotFoundError, ValueError: a checkpoint or text that does not exist or cannot be read.
      FloatingPointError: activations or losses that are not finite, or SAEs that are of no use.
      LockedError: another process writes to the directory.
    """
    if config is None:
        config = config_of(settings)
    elif settings:
        raise ConfigError(f"give a config or settings, not both: {', '.join(settings)}")
    run = Run(config.output_dir)
    with directory.claimed(run.path, config, map(config.variant_name, config.variants())) as locks:
        _train(run, config, locks, stop_requests)
    return run


def config_of(settings: dict[str, Any]) -> RunConfig:
    """Return the config of settings by field name; a single value stands for a tuple of one.

    Raises:
      ConfigError: a name that is no field, or a value that cannot work.
    """
    kinds = typing.get_type_hints(RunConfig)
    for name in settings:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name} is no setting of a run{hint}")
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if typing.get_origin(kinds[name]) is tuple:
            several = tuple(value) if isinstance(value, list | tuple | range) else (value,)
            value = tuple(map(str, several)) if typing.get_args(kinds[name])[0] is str else several
        elif isinstance(value, Path):
            value = str(value)
        values[name] = value
    return RunConfig(**values)


def _train(run: Run, config: RunConfig, locks: contextlib.ExitStack, stop_requests: "StopRequests | None") -> None:
    started = time.perf_counter()
    torch_device = device.share(config.device, config.jax_memory_fraction)

    import bridge.nanochat
    from bridge.selection import excluded_ids
    from bridge.stream import ActivationStream
    from bridge.training import loop, plan, text
    from bridge.training.finish import finish

    # The model, the text it reads and the SAEs to train.
    nano = bridge.nanochat.load(config.checkpoint, config.step, torch_device, tokenizer=config.tokenizer)
    trainees = plan.trainees(run.path, config, nano)
    plan.check_memory(config, trainees, nano.config.n_embd, plan.available_memory(config))
    sites = plan.sites(trainees)
    corpus, heldout = text.texts(config, nano)
    _announce(config, nano, trainees)
    rows = text.heldout_rows(config, heldout)
    text.check_activations(config, nano, sites, rows)  # what would end the run in its last minute
    text.check_data(run.path, corpus)
    facts = {"model": nano.fingerprint, "data": corpus.fingerprint, "data_files": corpus.files}
    directory.record(run.path, config, facts | {"hook_names": [list(hooks) for hooks in sites]})
    for trainee in trainees:
        if trainee.folder != run.path:
            locks.enter_context(files.Lock(trainee.folder))
            directory.record(trainee.folder, trainee.variant, facts)

    # The stream of activations, and the loop that trains on it.
    source = ActivationStream(
        nano.model,
        corpus,
        sites,
        excluded=excluded_ids(config.exclude_tokens, nano.tokenizer),
        rows_per_forward=max(config.tokens_per_forward // corpus.row_len, 1),
        drop_sinks=config.drop_sinks,
        decode=nano.tokenizer.decode,
    )
    states = loop.train(run.path, config, trainees, source, *(() if stop_requests is None else (stop_requests,)))
    if states is None:
        raise Stopped
    try:
        finish(config, trainees, states, nano, rows, corpus.fingerprint)
        if config.prepare_neuronpedia:
            for folder in dict.fromkeys(trainee.folder for trainee in trainees):
                _prepare_neuronpedia(Run(folder), config, torch_device)
    except KeyboardInterrupt as interrupt:  # SIGTERM too; all of the training is saved
        raise Stopped from interrupt
    print(f"took {time.perf_counter() - started:.0f} s in all")


def _announce(config: RunConfig, nano: "Nanochat", trainees: list["Trainee"]) -> None:
    """Print what will be trained, and which setting has no effect."""
    import jax

    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    if config.device == "cpu" and config.jax_memory_fraction != defaults["jax_memory_fraction"]:
        print("note: --jax_memory_fraction is of a GPU's memory and changes nothing with --device=cpu", flush=True)
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


def _prepare_neuronpedia(run: Run, config: RunConfig, torch_device: str) -> None:
    """Gather records of a run and write its export for Neuronpedia, with the defaults of the commands that do so."""
    from bridge import formats
    from bridge.exploration import Extent, explore, of_run
    from bridge.neuronpedia import sources

    explore(of_run(run, torch_device), Extent())
    wanted = sources.Wanted(model_id=config.model_id, source_set=config.source_set)
    for written in formats.write(run, sources.of_run(run.path, wanted)):
        print(written, flush=True)
