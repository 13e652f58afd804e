"""Trains a sparse autoencoder on the activations of a nanochat and exports it for torch and SAELens.

    python -m experiments.train --flagfile=experiments/configs/demo.flags

A run that was stopped or killed goes on, to the same numbers, with the same flags and --resume. One that was asked to
stop (Ctrl-C, SIGTERM) saves and exits with code 75, so that nothing that needs its result follows.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.run import Run
from bridge.run import directory as rundir
from bridge.training import device
from bridge.training.config import RunConfig
from experiments import flags, signals
from jsae import files
from jsae.settings import require

if TYPE_CHECKING:
    import numpy as np

    from bridge.nanochat import Nanochat
    from bridge.nanochat.corpus import Corpus
    from bridge.training.plan import Trainee


_MOST_TOKENS = 2**16  # in a forward pass over held-out text


def main(config: RunConfig) -> int:
    """Train, export, evaluate what was exported; or stop where it is asked to."""
    run = Path(config.output_dir)
    with rundir.claimed(run, config, map(config.variant_name, config.variants())) as held:
        return _train(run, config, held)


def _train(run: Path, config: RunConfig, held: contextlib.ExitStack) -> int:
    started = time.perf_counter()
    torch_device = device.share(config.device, config.jax_memory_fraction)

    import bridge.nanochat
    from bridge.selection import excluded_ids
    from bridge.stream import ActivationStream
    from bridge.training import plan
    from bridge.training.finish import finish
    from bridge.training.loop import train

    # The model, the text it reads and the SAEs that are wanted of it.
    nano = bridge.nanochat.load(config.checkpoint, config.step, torch_device, tokenizer=config.tokenizer)
    trainees = plan.of(run, config, nano)
    plan.check_memory(config, trainees, nano.config.n_embd, plan.available_memory(config))
    corpus, heldout = _texts(config, nano)
    _announce(config, nano, trainees)
    rows = _heldout(config, heldout)
    _check_activations(config, nano, plan.sites(trainees), rows)  # what would end the run in its last minute
    facts = {"model": nano.fingerprint, "data": corpus.fingerprint, "data_files": corpus.files}
    _check_data(run, corpus)
    rundir.record(run, config, facts | {"hook_names": [list(hooks) for hooks in plan.sites(trainees)]})
    for trainee in trainees:
        if trainee.folder != run:
            held.enter_context(files.Lock(trainee.folder))
            rundir.record(trainee.folder, trainee.variant, facts)

    # The stream of activations and the loop that learns from it.
    source = ActivationStream(
        nano.model,
        corpus,
        plan.sites(trainees),
        excluded=excluded_ids(config.exclude_tokens, nano.tokenizer),
        rows_per_forward=max(config.tokens_per_forward // corpus.row_len, 1),
        drop_sinks=config.drop_sinks,
        decode=nano.tokenizer.decode,
    )
    states = train(run, config, trainees, source, signals.stop_requests)
    if states is None:
        return _stopped()
    try:
        finish(config, trainees, states, nano, rows, corpus.fingerprint)
        if config.prepare_neuronpedia:
            for folder in dict.fromkeys(trainee.folder for trainee in trainees):
                _prepare_neuronpedia(folder, config, torch_device)
    except KeyboardInterrupt:  # SIGTERM too; all of the training is saved
        return _stopped()
    print(f"took {time.perf_counter() - started:.0f} s in all")
    return 0


def _stopped() -> int:
    """Say how a stopped run goes on; return its exit code."""
    command = shlex.join(word for word in sys.argv[1:] if word not in ("--resume", "--resume=true"))
    print(f"stopped and saved; go on with: python -m experiments.train {command} --resume", flush=True)
    return signals.STOPPED


def _announce(config: RunConfig, nano: "Nanochat", trainees: list["Trainee"]) -> None:
    """Says what is going to happen, and which flag changes nothing of it."""
    default = RunConfig.__dataclass_fields__["jax_memory_fraction"].default
    if config.device == "cpu" and config.jax_memory_fraction != default:
        print("note: --jax_memory_fraction is of a GPU's memory and changes nothing with --device=cpu", flush=True)
    import jax

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


def _texts(config: RunConfig, nano: "Nanochat") -> tuple["Corpus", "Corpus"]:
    """Training and held-out text, in rows as long as the model's context."""
    from bridge.nanochat.corpus import Corpus

    require(
        nano.tokenizer is not None,
        f"no tokenizer lies beside or above {config.checkpoint}: give its directory with --tokenizer",
    )
    longest = nano.config.max_positions
    row_len = config.context_size or nano.config.sequence_len
    require(2 <= row_len <= longest, f"context_size is {row_len}: this model takes 2 to {longest} tokens")
    train, heldout = (
        Corpus(config.data, nano.tokenizer, split=split, row_len=row_len, seed=config.data_seed)
        for split in ("train", "heldout")
    )
    if train.split_by_place:
        print("too few documents to hold out whole ones: the last 5 % of each is held out", flush=True)
    require(
        next(heldout.one_pass(1), None) is not None,
        f"the held-out part of {config.data!r} is shorter than one row of {row_len} tokens, and the trained SAE is "
        "measured on it: give more text, or a smaller --context_size",
    )
    return train, heldout


def _check_data(run: Path, corpus: "Corpus") -> None:
    """Refuse to go on with a run on data that is not what it began with, and say which file it is."""
    from bridge.nanochat.corpus import changed

    if not Run(run).config_file.is_file():
        return
    facts = rundir.read(run)["facts"]
    require(
        isinstance(facts.get("data_files"), list),
        f"the run in {run} is of a version that did not record what its data held, and cannot go on: start a new one",
    )
    what = changed(facts["data_files"], corpus.files)
    require(not what, f"{run} cannot go on to the same numbers, its data is not what it was: {what}")


def _heldout(config: RunConfig, heldout: "Corpus") -> "np.ndarray":
    """Return the held-out rows that the exports are measured on, (rows, tokens)."""
    import numpy as np

    return np.stack(list(heldout.one_pass(-(-config.heldout_tokens // heldout.row_len))))


def _check_activations(
    config: RunConfig, nano: "Nanochat", sites: Sequence[tuple[str, ...]], rows: "np.ndarray"
) -> None:
    """Warn of weights that are not finite, and check that all activations on held-out text can be measured.

    Raises:
      ActivationsError, DegenerateError: they cannot; names hook, token and place.
    """
    from bridge import finite
    from bridge.selection import excluded_ids

    finite.warn_of_broken_weights(nano.model)
    step = max(min(config.tokens_per_forward, _MOST_TOKENS) // rows.shape[1], 1)
    finite.check_text(
        nano.model,
        list(dict.fromkeys(hook for site in sites for hook in site)),
        [rows[start : start + step] for start in range(0, len(rows), step)],
        excluded=excluded_ids(config.exclude_tokens, nano.tokenizer),
        drop_sinks=config.drop_sinks,
        called=f"the held-out part of {config.data!r}",
        decode=nano.tokenizer.decode,
    )


def _prepare_neuronpedia(folder: Path, config: RunConfig, device: str) -> None:
    """Write the explorer's files of a run and its export for Neuronpedia, with the defaults of those commands."""
    from bridge import formats
    from bridge.explorer.explore import Extent, explore, of_run
    from bridge.neuronpedia import sources
    from experiments import explore_view

    run = Run(folder)
    explore(of_run(run, device), Extent(), say=explore_view.say, progress=explore_view.progress)
    wanted = sources.Wanted(model_id=config.model_id, source_set=config.source_set)
    for written in formats.write(run, sources.of_run(folder, wanted)):
        print(written, flush=True)


if __name__ == "__main__":
    flags.run(RunConfig, main)
