"""The files that watching writes into its run directory: metrics, and the exported SAEs of every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bridge.evaluate.core import finite
from bridge.run import Run
from bridge.selection import sink_rule
from bridge.training import finish, report
from bridge.training.origins import Origin
from jsae import export, files, metrics
from jsae.settings import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from bridge.live.config import WatchConfig
    from bridge.training.config import RunConfig
    from bridge.training.plan import Trainee
    from jsae.loop import AllSums, States
    from jsae.saelens import Plain

_REPORTED = ("loss", "fvu", "l0", "mse", "cosine", "dead_fraction", "density_histogram", "learning_rate")


class LiveOrigin(Origin):
    """The training as the origin of activations: each batch is measured before it is trained on.

    Args:
      config: the settings.
      excluded: ids of tokens that are left out.
    """

    def __init__(self, config: WatchConfig, excluded: Sequence[int]):
        self._config, self._excluded = config, list(excluded)
        self.facts, self.data_shards, self.own_shards = {}, 1, (0,)
        self.compiled, self.name = (None, "the training runs the model"), f"the training of {config.checkpoint}"
        self.sums: dict[str, metrics.Sums] = {}
        """By name of the SAE, over the batches since the last checkpoint."""

    def source(self, sites: Sequence[tuple[str, ...]]) -> Any:
        """Raise TypeError: the training calls, nobody can ask it."""
        raise TypeError("activations of a training come when it computes them")

    def measure(self, trainee: Trainee, folder: Path) -> metrics.Sums:
        """Return the sums of the batches since the last checkpoint, none of which was trained on before."""
        return self.sums[trainee.name]

    def own_saes(self, trainee: Trainee, folder: Path) -> list[Plain]:
        """Raise ConfigError: one model is trained."""
        raise ConfigError(f"{folder} reads a training of one model, not checkpoints")

    def metadata(self) -> dict[str, Any]:
        """Return what is known of the model; its fingerprint is not, before its file is written."""
        config = self._config
        return {
            "model_name": "nanochat",
            "model_class_name": "nanochat",
            "model_fingerprint": None,
            "exclude_special_tokens": self._excluded,
            "drop_sinks": config.drop_sinks,
            **sink_rule(config.drop_sinks),
            "dataset_path": config.data,
        }


class Results:
    """The files of a watched run. A context manager.

    Args:
      config: the settings.
      settings: the same as those of a training of SAEs.
      trainees: the SAEs.
      excluded: ids of tokens that are left out.
      start: step of the training from which the run goes on; lines of metrics after it are dropped.
    """

    def __init__(
        self,
        config: WatchConfig,
        settings: RunConfig,
        trainees: Sequence[Trainee],
        excluded: Sequence[int],
        start: int,
    ):
        self._settings, self._trainees = settings, trainees
        self._run, self._origin = Run(config.output_dir), LiveOrigin(config, excluded)
        report.keep_until(self._run.metrics_file, start)
        self._lines = files.Lines(self._run.metrics_file, sync=False)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._lines.close()

    def report(
        self,
        step_of_training: int,
        batches: int,
        values: Sequence[dict[str, Any]],
        scales: Sequence[float],
        watch: dict[str, float],
    ) -> None:
        """Append a line of metrics for every SAE.

        Args:
          step_of_training: steps that the training has taken.
          batches: batches of the SAEs so far.
          values: metrics of every SAE since the last report.
          scales: the scale of every SAE's input.
          watch: figures of the watching.
        """
        for trainee, value, scale in zip(self._trainees, values, scales, strict=True):
            line = {"step": step_of_training, "hook": trainee.name, "batches": batches}
            line |= {name: value[name] for name in _REPORTED} | {"scale": scale} | watch
            self._lines.append(json.dumps(finite(line)))

    def export(self, states: States, sums: AllSums, step_of_training: int, batches: int) -> None:
        """Write the SAEs of a checkpoint: as those of the run, and again in a folder of the step, which stays.

        Args:
          states: the states of the SAEs.
          sums: their metric sums since the last checkpoint.
          step_of_training: steps that the training has taken.
          batches: batches of the SAEs so far.
        """
        saes = finish.finished(states)
        tables = {}
        for trainee, sae, total in zip(self._trainees, saes, sums, strict=True):
            self._origin.sums[trainee.name] = total
            metadata = finish.metadata_of(self._settings, trainee, self._origin)
            metadata |= {"training_tokens": batches * trainee.member.train.batch_size, "model_step": step_of_training}
            stage = self._run.stage_folder(f"step{step_of_training:06d}", trainee.name)
            export.write(stage, sae.sae.config, sae.sae.arrays(), sae.scale, sae.scale_out, metadata)
            export.write_sparsity(stage, metrics.density(total))
            tables[trainee.name] = {"eval": finite(finish.write(trainee, sae, self._origin, metadata))}
        self._run.write_evaluation(tables)
