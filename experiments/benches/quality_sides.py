"""Training on jsae's side of the quality measurements, and the reconstruction scores of any SAE."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from bridge import TorchSAE
    from jsae import TrainConfig
    from jsae.architectures import SAEConfig
    from jsae.loop import Programs
    from jsae.synthetic import SyntheticWorld

_CHUNK = 8192  # activations per batch of the scoring
_TRAINED = 65_536  # of the last activations of training, on which dead latents are counted too
# Mean error over the norm of inputs or of reconstructions, whichever is larger: a latent at its threshold may be active
# on one side only, and an SAE that learned badly may reconstruct by large latents that cancel.
_TOLERANCE = 1e-4


@contextmanager
def compiled_once() -> Iterator[None]:
    """Keep compiled programs on the disk meanwhile: SAEs that differ by rate or seed alone share theirs.

    A cache that the user has configured stays.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
            compilation_cache.reset_cache()  # jax would go on writing to the folder


def train_here(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train with jsae and export; `quality_peer.py` does the same job with the other trainers.

    Args:
      job: recipe, sizes and schedule, as `quality_peer.py` receives it.
      folder: of `train.npy`.

    Returns:
      `seconds` of training without the first step, which compiles; whether all values stayed `finite`; the peak `rate`;
      and the last `strength` of the penalty, 1 where L0 has no target.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jsae import export, loop

    acts = np.load(folder / "train.npy", mmap_mode="r")
    sae, config = _configs(job)
    members = [loop.Member(sae, config)]
    initial = loop.init(members, (jnp.asarray(acts[: 16 * job["batch_size"]]),))
    start, rate = 0.0, float(initial[0].rate)
    for step, (state,), _ in loop.fit(
        members, initial, ((batch,) for batch in _batches(job, acts)), _programs(sae, config)
    ):
        if step == 1:
            jax.block_until_ready(state.step)
            start = time.perf_counter()
    finite = bool(jax.block_until_ready(state.bad_step) < 0)
    end = time.perf_counter()
    if finite:
        weights = state.exported.arrays()
        export.write(Path(job["folder"]), sae, weights, np.asarray(state.scale), np.asarray(state.scale_out), {})
    return {"seconds": end - start, "finite": finite, "rate": rate, "strength": float(state.control.strength)}


def _programs(sae: SAEConfig, config: TrainConfig) -> Programs:
    """Return the compiled steps of a training; other seeds and rates have the same, unless latents are resampled."""
    if config.resample_every is None:
        config = dataclasses.replace(config, seed=0, learning_rate=None)
    return _compiled(sae, config)


@functools.lru_cache(16)
def _compiled(sae: SAEConfig, config: TrainConfig) -> Programs:
    from jsae import loop

    return loop.Programs([loop.Member(sae, config)])


def train_on_world(job: dict[str, Any], world: SyntheticWorld) -> dict[str, Any]:
    """Train with jsae on samples that are made on its device, and export; answer as `train_here`, but for `strength`.

    The peak `rate` is that of the progress reports, and missing where the training fails.
    """
    import jsae

    sae, config = _configs(job)
    start, rates = time.perf_counter(), []
    try:
        trained = jsae.train(
            world.with_samples(0), sae, config, progress=lambda report: rates.append(report.metrics["learning_rate"])
        )
    except FloatingPointError:
        return {"seconds": time.perf_counter() - start, "finite": False}
    trained.save(Path(job["folder"]))
    return {"seconds": time.perf_counter() - start, "finite": True, "rate": max(rates)}


def _configs(job: dict[str, Any]) -> tuple[SAEConfig, TrainConfig]:
    """Return the settings of a job; with `nothing_given` all that a recipe can leave out is left out.

    `sae` and `train` of the job are settings that are given besides.
    """
    from jsae.architectures import find, sae_config
    from jsae.config import TrainConfig

    name, _, variant = job["recipe"].partition(" ")
    settings = {"k": job["k"]} if job["coefficient"] is None else {"target_l0": job["coefficient"]}
    settings |= {"jump_recipe": variant} if variant and not job["nothing_given"] else {}
    nested = any(field.name == "nested_widths" for field in dataclasses.fields(find(name).Config))
    settings |= {"nested_widths": tuple(job["widths"])} if nested else {}
    schedule: dict[str, Any] = {}
    if not job["nothing_given"]:
        schedule = {"learning_rate": job["rate"]}
    settings, schedule = settings | job.get("sae", {}), schedule | job.get("train", {})
    return sae_config(name, job["d_in"], job["d_sae"], **settings), TrainConfig(
        num_activations=job["steps"] * job["batch_size"],
        batch_size=job["batch_size"],
        seed=job["seed"],
        **schedule,
    )


def _batches(job: dict[str, Any], acts: np.ndarray) -> Iterator[Any]:
    import jax.numpy as jnp

    for number in range(job["steps"]):
        yield jnp.asarray(acts[number * job["batch_size"] : (number + 1) * job["batch_size"]])


def score(folder: Path, activations: Path, heldout: np.ndarray) -> dict[str, float]:
    """Return FVU, L0 and dead latents of an exported SAE on held-out activations, and its dead latents in training.

    Held-out text is other documents: a latent of a word that stands in one document only is silent there without being
    dead. So `dead_fraction` counts latents that no held-out activation makes fire, and `dead_in_training` those that
    none of the last activations of the training makes fire.

    Args:
      folder: of the SAE, from any trainer.
      activations: folder of `train.npy`.
      heldout: held-out activations, (n, d).

    Raises:
      ValueError: the export reconstructs differently from the library that trained it.
    """
    import numpy as np
    import torch

    from bridge import torch_sae
    from jsae import metrics

    sae = torch_sae.load(folder)
    check(folder, activations)
    total: metrics.Sums | None = None
    with torch.no_grad():
        for x in torch.from_numpy(heldout).split(_CHUNK):
            latents = sae.encode(x)
            exact = x.double().numpy()
            error = sae.decode(latents).double().numpy() - exact
            fired = (latents != 0).sum(0).numpy()
            sums = metrics.batch_sums(
                exact, error, l0=fired.sum(), l1=latents.abs().sum().item(), fired=fired, loss=0.0, nonfinite=0
            )
            total = sums if total is None else metrics.add(total, sums)
    summary = metrics.summarize(total)
    scores = {name: summary[name] for name in ("fvu", "l0", "dead_fraction")}
    return scores | {"dead_in_training": _dead(sae, np.load(activations / "train.npy", mmap_mode="r")[-_TRAINED:])}


def _dead(sae: TorchSAE, acts: np.ndarray) -> float:
    """Return the fraction of latents that fire on none of some activations."""
    import torch

    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    with torch.no_grad():
        for start in range(0, len(acts), _CHUNK):
            fired |= (sae.encode(torch.from_numpy(acts[start : start + _CHUNK].copy())) != 0).any(0)
    return float((~fired).float().mean())


def check(folder: Path, activations: Path) -> None:
    """Compare an export with `made.npy`, the library's own reconstruction of the first activations.

    Raises:
      ValueError: they differ.
    """
    import numpy as np
    import torch

    from bridge import torch_sae

    if not (folder / "made.npy").is_file():
        return
    sae, expected = torch_sae.load(folder), np.load(folder / "made.npy")
    x = np.load(activations / "train.npy", mmap_mode="r")[: len(expected)].copy()
    with torch.no_grad():
        error = np.linalg.norm(sae(torch.from_numpy(x)).numpy() - expected, axis=1)
    norms = [np.linalg.norm(side, axis=1).mean() for side in (x, expected)]  # single rows may be 0: of a silent MLP
    distance = error.mean() / max(norms)
    if not distance < _TOLERANCE:
        raise ValueError(
            f"{folder}: the export does not reconstruct as its library does: they differ by {distance:.2g} of the norm"
        )
