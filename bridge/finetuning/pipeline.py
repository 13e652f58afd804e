"""Fine-tune an exported SAE by the output of its model, from Python, in one call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge import launch
from bridge.finetuning.config import FinetuneConfig
from bridge.run import Run, directory
from bridge.run.layout import WRITTEN
from bridge.settings import from_keywords
from bridge.training import device
from jsae import files
from jsae.settings import require

if TYPE_CHECKING:
    from bridge.evaluate.site import Site
    from bridge.finetuning.loop import Steps
    from bridge.finetuning.subject import Subject
    from bridge.nanochat import Nanochat
    from bridge.training.config import RunConfig
    from bridge.training.plan import Trainee

_LEAST_L0 = 1e-3  # that the controller of L0 is told to keep
_PARTS = 20  # length of an unknown training in fine-tunings, as in Karvonen 2025


def finetune(config: FinetuneConfig | None = None, **settings: Any) -> Run:
    """Fine-tune an exported SAE so that the model's output changes less where its reconstruction is put in.

        run = bridge.finetune(sae="runs/demo", out="runs/demo-kl")

    Karvonen 2025 (arXiv 2503.17272): a short training by MSE + KL(model || model with the reconstruction), the latter
    scaled to the size of the former in every batch, with a fresh Adam and a rate that falls linearly to zero. Penalised
    architectures keep their L0 on held-out text by the controller, which begins at the strength that balances the loss.

    Args:
      config: all settings.
      settings: fields of `FinetuneConfig` instead.

    Returns:
      The new run: config.json, metrics.jsonl, the export, and eval.json with the metrics before and after.

    Raises:
      ConfigError: settings that cannot work, an SAE that cannot be fine-tuned, or a directory that holds something.
      FileNotFoundError, ValueError: an SAE, checkpoint or text that does not exist or cannot be read.
      FloatingPointError: activations or losses that are not finite.
      UnusableError: the exported SAE is of no use; it is kept, and marked.
      LockedError: another process writes to the directory.
    """
    require(config is None or not settings, f"give a config or settings, not both: {', '.join(settings)}")
    config = from_keywords(FinetuneConfig, settings) if config is None else config
    require(launch.detected() is None, "fine-tuning runs in one process: start it without a launcher")
    torch_device = device.open_torch(config.device)
    from bridge.finetuning import subject as subjects

    subject = subjects.find(config)
    config = subjects.resolved(config, subject)
    with _claimed(config) as run:
        _finetune(run, config, subject, torch_device)
    return run


@contextlib.contextmanager
def _claimed(config: FinetuneConfig) -> Iterator[Run]:
    """Create and lock the new run's directory.

    Raises:
      ConfigError: it holds something already.
      LockedError: another process writes to it.
    """
    run = Run(config.out)
    require(not run.path.exists() or run.path.is_dir(), f"{run.path} is a file: choose another --out")
    with files.Lock(run.path):
        ignored = {files.LOCK, *(name + files.PARTIAL for name in WRITTEN)}
        others = [path.name for path in run.path.iterdir() if path.name not in ignored]
        require(not others, f"{run.path} already holds something ({', '.join(others[:5])}): choose another --out")
        yield run


def _finetune(run: Run, config: FinetuneConfig, subject: Subject, torch_device: str) -> None:
    """Fine-tune into a directory that is locked."""
    started = time.perf_counter()
    import bridge.nanochat
    from bridge.finetuning import measuring
    from bridge.finetuning import subject as subjects
    from bridge.training import continuing, plan
    from bridge.training.origins import TextOrigin

    nano = bridge.nanochat.load(config.checkpoint, config.step, torch_device, tokenizer=config.tokenizer)
    settings = subjects.run_config(config, subject, nano)
    starts = continuing.Starts(subject.path)
    (trainee,) = plan.trainees(run.path, settings, nano, starts)
    fraction = plan.jax_fraction(settings, [trainee], nano)
    device.open_jax(torch_device, fraction)
    origin = TextOrigin(settings, [nano], [trainee.hooks], data_shards=1)
    site = _site(settings, trainee, nano)
    _announce(config, settings, subject, nano, origin.name)

    token_bytes = nano.tokenizer.token_bytes
    before = measuring.measure(site, subject.path, origin.heldout, token_bytes)
    trainee = _keeping_l0(trainee, before["l0"])
    config = dataclasses.replace(
        config, **{name: getattr(settings, name) for name in ("batch_size", "exclude_tokens", "dead_after")}
    )
    steps = _steps(config, trainee, subject, site, origin)
    facts = origin.facts | starts.facts([trainee.name]) | {"finetuning": {"rate": float(steps.state.rate)}}
    directory.record(run.path, config, facts)
    with files.Lines(run.metrics_file, sync=False) as lines:
        lines.append(json.dumps({"step": 0, "hook": trainee.name, "heldout": before}))
        _train(config, trainee, steps, lines)
        summary = _export(trainee, steps, origin, _metadata(settings, trainee, origin, subject, config))
        after = measuring.measure(site, run.sae_folder(trainee.name), origin.heldout, token_bytes)
        lines.append(json.dumps({"step": trainee.member.train.num_steps, "hook": trainee.name, "heldout": after}))
    summary["finetuning"] = {"before": before, "after": after}
    _write_evaluation(run, trainee.name, summary)
    measuring.show(before, after, origin.heldout.size)
    print(f"exported SAE    {run.sae_folder(trainee.name)}")
    print(f"metrics         metrics.jsonl and eval.json in {run.path}")
    print(f"took {time.perf_counter() - started:.0f} s in all")
    _refuse_unusable(trainee, summary)


def _site(settings: RunConfig, trainee: Trainee, nano: Nanochat) -> Site:
    from bridge.evaluate.site import Site
    from bridge.selection import excluded_ids

    excluded = excluded_ids(settings.exclude_tokens, nano.tokenizer)
    hooks = trainee.hooks
    return Site(nano.model, hooks[0], excluded, settings.drop_sinks, settings.tokens_per_forward, hooks[1:])


def _keeping_l0(trainee: Trainee, l0: float) -> Trainee:
    """Return the SAE with its present L0 as the controller's target, if its architecture has one."""
    member = trainee.member
    if "target_l0" not in {field.name for field in dataclasses.fields(member.sae)}:
        return trainee
    target = min(max(l0, _LEAST_L0), member.sae.d_sae)
    sae = dataclasses.replace(member.sae, target_l0=target)  # type: ignore[call-arg]
    return dataclasses.replace(trainee, member=member._replace(sae=sae))


def _announce(config: FinetuneConfig, settings: RunConfig, subject: Subject, nano: Nanochat, origin: str) -> None:
    """Print what is fine-tuned, and a note where the model is another than the SAE's."""
    print(f"{origin}: fine-tunes {subject.path}, {subject.start.description.kind}, as {config.activation}", flush=True)
    added = {"kl": " + KL divergence", "ce": " + cross-entropy", "mse": ""}[config.objective]
    windows = settings.batch_size // nano.row_length(config.context_size)
    print(
        f"squared error{added} on {settings.num_activations:,} activations, {settings.batch_size:,} a step in "
        f"{windows} window(s) of text",
        flush=True,
    )
    known = subject.metadata.get("model_fingerprint")
    if known is not None and known != nano.fingerprint:
        print(
            f"note: the SAE was trained on the checkpoint with sha256 {known!s:.64}, and this one has "
            f"{nano.fingerprint}: it is fine-tuned to this one",
            flush=True,
        )
    if subject.start.description.note is not None:
        print(f"note: {subject.start.description.note}", flush=True)


def _steps(config: FinetuneConfig, trainee: Trainee, subject: Subject, site: Site, origin: Any) -> Steps:
    from bridge.finetuning.loop import Steps
    from bridge.finetuning.spliced import SplicedModel

    row_len = origin.corpus.row_len
    model = SplicedModel(
        site.model,
        trainee.hooks,
        config.objective,
        excluded=site.excluded,
        drop_sinks=site.drop_sinks,
        rows_per_forward=config.tokens_per_forward // row_len,
    )
    guided = config.objective != "mse"
    training = subject.training_tokens or _PARTS * config.num_activations
    return Steps(trainee.member, subject.start, model, origin.corpus.next_rows, row_len, guided, training)


def _train(config: FinetuneConfig, trainee: Trainee, steps: Steps, lines: files.Lines) -> None:
    """Take all steps, with a line of metrics per report."""
    from jsae.progress import Progress

    names = ("loss", "fvu", "l0", "mse", "cosine", "dead_fraction", "density_histogram", "learning_rate", "kl", "ce")
    shown = {"kl": "KL", "ce": "CE", "fvu": "FVU", "l0": "L0"}
    with Progress("fine-tuning", trainee.member.train.num_steps, "steps") as progress:
        note = ""
        for number, values in steps.run(config.log_every):
            if values is not None:
                line = {name: values[name] for name in names if name in values}
                lines.append(json.dumps({"step": number, "hook": trainee.name, **line}))
                note = "  ".join(f"{title} {line[name]:.4g}" for name, title in shown.items() if name in line)
            progress.update(number, note)


def _metadata(
    settings: RunConfig, trainee: Trainee, origin: Any, subject: Subject, config: FinetuneConfig
) -> dict[str, Any]:
    """Return the metadata of the export: that of its training, which both trainings together are now."""
    from bridge.training import finish

    metadata = finish.metadata_of(settings, trainee, origin)
    activations = metadata["training_tokens"]
    metadata["finetuning"] = {"objective": config.objective, "activations": activations}
    return metadata | {"training_tokens": activations + (subject.training_tokens or 0)}


def _export(trainee: Trainee, steps: Steps, origin: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """Export the SAE; return its metrics."""
    from bridge.training import finish

    (finished,) = finish.finished((steps.state,))
    return finish.write(trainee, finished, origin, metadata)


def _write_evaluation(run: Run, name: str, summary: dict[str, Any]) -> None:
    from bridge.evaluate.core import finite

    text = json.dumps(finite({name: summary}), indent=2, allow_nan=False)
    files.write(Path(run.table_file("eval")), text + "\n")


def _refuse_unusable(trainee: Trainee, summary: dict[str, Any]) -> None:
    """Raise UnusableError for an SAE of no use."""
    from bridge.training.finish import UnusableError

    if "problem" in summary:
        raise UnusableError(
            f"the fine-tuned SAE of {trainee.name} is of no use: {summary['problem']}. It is kept for inspection, and "
            "marked; lower --learning_rate"
        )
