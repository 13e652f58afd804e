"""Activations of the `quality` measurement, training on jsae's side, and the scores of any SAE."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from bridge.evaluate import Site
    from bridge.torch_sae import TorchSAE

_CHUNK = 8192  # held-out activations per batch of the scoring
_TOLERANCE = 1e-4  # mean error over the norm: a latent at its threshold may be active on one side only


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model and the held-out text on which SAEs are scored."""

    site: Site
    rows: np.ndarray
    """Held-out tokens for the loss, (R, T)."""
    token_bytes: np.ndarray
    heldout: np.ndarray
    """Held-out activations, (n, d)."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.heldout.shape[1]


def lay_out(folder: Path, *, checkpoint: str, data: str, layer: int, train: int, heldout: int, loss: int) -> Subject:
    """Write `train.npy`, shuffled activations of a nanochat, which every trainer reads from first to last.

    Args:
      folder: to write to.
      checkpoint: of the nanochat.
      data: text for the checkpoint.
      layer: the layer whose residual stream is read.
      train: number of activations to train on.
      heldout: number of held-out activations to score on, or fewer if the text is short.
      loss: number of held-out tokens to measure the loss on.

    Returns:
      the model and the held-out text.
    """
    import numpy as np

    import bridge.nanochat
    from bridge.evaluate import Site
    from bridge.hooks import hook_name
    from bridge.nanochat.corpus import Corpus

    nano = bridge.nanochat.load(checkpoint)
    excluded, row_len = (nano.tokenizer.bos_token_id,), nano.config.sequence_len
    site = Site(nano.model, hook_name(layer, "resid_post"), excluded)
    corpus, heldout_corpus = (Corpus(data, nano.tokenizer, split=s, row_len=row_len) for s in ("train", "heldout"))
    endless = (corpus.next_rows(max(site.tokens_per_forward // row_len, 1)) for _ in iter(int, 1))
    acts = _gathered(site, endless, train)
    np.save(folder / "train.npy", acts[np.random.default_rng(0).permutation(len(acts))])
    rows = np.stack(list(heldout_corpus.one_pass(-(-heldout // row_len))))
    return Subject(
        site,
        rows[: max(loss // row_len, 1)],
        np.asarray(nano.tokenizer.token_bytes),
        _gathered(site, site.batches(rows), heldout),
    )


def _gathered(site: Site, batches: Any, limit: int) -> np.ndarray:
    """Return the first activations of tokens that count, (at most limit, d)."""
    import numpy as np

    parts: list[np.ndarray] = []
    count = 0
    for batch in site.read(batches):
        parts.append(batch.acts[batch.mask].float().numpy())
        count += len(parts[-1])
        if count >= limit:
            break
    return np.concatenate(parts)[:limit]


def train_here(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train with jsae and export; `quality_peer.py` does the same job with the other trainers.

    Args:
      job: recipe, sizes and schedule, as `quality_peer.py` receives it.
      folder: of `train.npy`.

    Returns:
      `seconds` of training without the first step, which compiles; and whether all values stayed `finite`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jsae import export, loop
    from jsae.architectures import find, sae_config
    from jsae.config import TrainConfig

    acts = np.load(folder / "train.npy", mmap_mode="r")
    name, _, variant = job["recipe"].partition(" ")
    settings = {"k": job["k"]} if job["coefficient"] is None else {"target_l0": job["coefficient"]}
    settings |= {"jump_recipe": variant} if variant else {}
    nested = any(field.name == "nested_widths" for field in dataclasses.fields(find(name).Config))
    settings |= {"nested_widths": tuple(job["widths"])} if nested else {}
    sae = sae_config(name, job["d_in"], job["d_sae"], **settings)
    config = TrainConfig(
        num_activations=job["steps"] * job["batch_size"],
        batch_size=job["batch_size"],
        learning_rate=job["rate"],
        dead_after=max(round(job["dead"] * job["steps"]), 1) * job["batch_size"],
        seed=job["seed"],
    )
    members = [loop.Member(sae, config)]
    initial = loop.init(members, (jnp.asarray(acts[: 16 * job["batch_size"]]),))
    start = 0.0
    for step, (state,), _ in loop.fit(members, initial, ((batch,) for batch in _batches(job, acts))):
        if step == 1:
            jax.block_until_ready(state.step)
            start = time.perf_counter()
    finite = bool(jax.block_until_ready(state.bad_step) < 0)
    end = time.perf_counter()
    if finite:
        weights = state.exported.arrays()
        export.write(Path(job["folder"]), sae, weights, np.asarray(state.scale), np.asarray(state.scale_out), {})
    return {"seconds": end - start, "finite": finite}


def _batches(job: dict[str, Any], acts: np.ndarray) -> Iterator[Any]:
    import jax.numpy as jnp

    for number in range(job["steps"]):
        yield jnp.asarray(acts[number * job["batch_size"] : (number + 1) * job["batch_size"]])


def score(folder: Path, activations: Path, subject: Subject) -> dict[str, float]:
    """Return FVU, L0 and dead fraction of an exported SAE on the held-out activations.

    Args:
      folder: of the SAE, from any trainer.
      activations: folder of `train.npy`.
      subject: with the held-out activations.

    Raises:
      ValueError: the export reconstructs differently from the library that trained it.
    """
    import torch

    from bridge import torch_sae
    from jsae import metrics

    sae = torch_sae.load(folder)
    _check(sae, folder, activations)
    total: metrics.Sums | None = None
    with torch.no_grad():
        for x in torch.from_numpy(subject.heldout).split(_CHUNK):
            latents = sae.encode(x)
            exact = x.double().numpy()
            error = sae.decode(latents).double().numpy() - exact
            fired = (latents != 0).sum(0).numpy()
            sums = metrics.batch_sums(
                exact, error, l0=fired.sum(), l1=latents.abs().sum().item(), fired=fired, loss=0.0, nonfinite=0
            )
            total = sums if total is None else metrics.add(total, sums)
    summary = metrics.summarize(total)
    return {name: summary[name] for name in ("fvu", "l0", "dead_fraction")}


def loss_recovered(folder: Path, subject: Subject) -> float:
    """Return (ablated - spliced) / (ablated - original), of the model's cross-entropy.

    The activations are replaced by zeros in the ablated model, by their reconstruction in the spliced one.
    """
    from bridge import torch_sae
    from bridge.evaluate.splice import effects

    batches = subject.site.batches(subject.rows, len(subject.token_bytes))
    losses = effects(subject.site, torch_sae.load(folder), batches, subject.heldout.mean(0), subject.token_bytes)
    ablated = losses["with_ablation"].cross_entropy
    return (ablated - losses["with_sae"].cross_entropy) / (ablated - losses["without_sae"].cross_entropy)


def _check(sae: TorchSAE, folder: Path, activations: Path) -> None:
    """Compare an export with `made.npy`, the library's own reconstruction of the first activations."""
    import numpy as np
    import torch

    if not (folder / "made.npy").is_file():
        return
    expected = np.load(folder / "made.npy")
    x = np.load(activations / "train.npy", mmap_mode="r")[: len(expected)].copy()
    with torch.no_grad():
        distance = np.linalg.norm(sae(torch.from_numpy(x)).numpy() - expected, axis=1) / np.linalg.norm(x, axis=1)
    if not np.mean(distance) < _TOLERANCE:
        raise ValueError(
            f"{folder}: the export does not reconstruct as its library does: they differ by {np.mean(distance):.2g} |x|"
        )
