"""What the `quality` measurement works on, how an SAE is trained on this project's side, and how any SAE is scored."""

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

_CHUNK = 8192  # held-out activations that are scored at once
_SAME = 1e-4  # of the norm, on the mean: a latent at its threshold may fall on either side


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is left of the text and the model once the activations are on the disk."""

    site: Site
    rows: np.ndarray
    """Held-out tokens on which the loss is measured, (R, T)."""
    token_bytes: np.ndarray
    heldout: np.ndarray
    """Held-out activations, (n, d)."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.heldout.shape[1]


def lay_out(folder: Path, *, checkpoint: str, data: str, layer: int, train: int, heldout: int, loss: int) -> Subject:
    """Writes `train.npy`: activations of a nanochat, shuffled once, which every trainer reads from first to last.

    Args:
      folder: where it goes.
      checkpoint: of the nanochat.
      data: its text.
      layer: whose residual stream is read.
      train: activations to train on.
      heldout: activations of held-out text to score on, as far as there is text.
      loss: held-out tokens to measure the loss on.
    """
    import numpy as np

    import bridge.nanochat
    from bridge.evaluate import Site
    from bridge.hooks import hook_name
    from bridge.nanochat.corpus import Corpus

    nano = bridge.nanochat.load(checkpoint)
    excluded, row_len = (nano.tokenizer.bos_token_id,), nano.config.sequence_len
    site = Site(nano.model, hook_name(layer, "resid_post"), excluded)
    corpus, kept_out = (Corpus(data, nano.tokenizer, split=s, row_len=row_len) for s in ("train", "heldout"))
    endless = (corpus.next_rows(max(site.tokens_per_forward // row_len, 1)) for _ in iter(int, 1))
    acts = _gathered(site, endless, train)
    np.save(folder / "train.npy", acts[np.random.default_rng(0).permutation(len(acts))])
    rows = np.stack(list(kept_out.one_pass(-(-heldout // row_len))))
    return Subject(
        site,
        rows[: max(loss // row_len, 1)],
        np.asarray(nano.tokenizer.token_bytes),
        _gathered(site, site.batches(rows), heldout),
    )


def _gathered(site: Site, batches: Any, wanted: int) -> np.ndarray:
    """The first activations that count, (at most wanted, d)."""
    import numpy as np

    parts: list[np.ndarray] = []
    have = 0
    for batch in site.read(batches):
        parts.append(batch.acts[batch.mask].float().numpy())
        have += len(parts[-1])
        if have >= wanted:
            break
    return np.concatenate(parts)[:wanted]


def train_here(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains with this project and exports; the peers' `quality_peer.py` does the same job with theirs.

    Returns:
      `seconds` of training without the first step, which compiles; and whether all stayed `finite`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jsae import export, loop
    from jsae.architectures import find, sae_config
    from jsae.config import TrainConfig

    acts = np.load(folder / "train.npy", mmap_mode="r")
    name, _, recipe = job["recipe"].partition(" ")
    own = {"k": job["k"]} if job["coefficient"] is None else {"target_l0": job["coefficient"]}
    own |= {"jump_recipe": recipe} if recipe else {}
    nested = any(field.name == "nested_widths" for field in dataclasses.fields(find(name).Config))
    own |= {"nested_widths": tuple(job["widths"])} if nested else {}
    sae = sae_config(name, job["d_in"], job["d_sae"], **own)
    config = TrainConfig(
        num_activations=job["steps"] * job["batch_size"],
        batch_size=job["batch_size"],
        learning_rate=job["rate"],
        dead_after=max(round(job["dead"] * job["steps"]), 1) * job["batch_size"],
        seed=job["seed"],
    )
    members = [loop.Member(sae, config)]
    begun = loop.init(members, (jnp.asarray(acts[: 16 * job["batch_size"]]),))
    first = 0.0
    for step, (state,), _ in loop.fit(members, begun, ((batch,) for batch in _batches(job, acts))):
        if step == 1:
            jax.block_until_ready(state.step)
            first = time.perf_counter()
    finite = bool(jax.block_until_ready(state.bad_step) < 0)
    end = time.perf_counter()
    if finite:
        weights = state.exported.arrays()
        export.write(Path(job["folder"]), sae, weights, np.asarray(state.scale), np.asarray(state.scale_out), {})
    return {"seconds": end - first, "finite": finite}


def _batches(job: dict[str, Any], acts: np.ndarray) -> Iterator[Any]:
    import jax.numpy as jnp

    for number in range(job["steps"]):
        yield jnp.asarray(acts[number * job["batch_size"] : (number + 1) * job["batch_size"]])


def score(folder: Path, activations: Path, subject: Subject) -> dict[str, float]:
    """FVU, L0 and dead fraction of an exported SAE on the held-out activations, whoever trained it.

    Raises:
      ValueError: a library makes something else of activations than the export of what it learned.
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
            sums = metrics.batch_sums(
                exact, error, latents.numpy(), (latents != 0).sum(0).numpy(), loss=0.0, nonfinite=0
            )
            total = sums if total is None else metrics.add(total, sums)
    found = metrics.summarize(total)
    return {name: found[name] for name in ("fvu", "l0", "dead_fraction")}


def loss_recovered(folder: Path, subject: Subject) -> float:
    """The share of the loss that zero ablation costs the model and the SAE in its place does not."""
    from bridge import torch_sae
    from bridge.evaluate.splice import effects

    batches = subject.site.batches(subject.rows, len(subject.token_bytes))
    found = effects(subject.site, torch_sae.load(folder), batches, subject.heldout.mean(0), subject.token_bytes)
    ablated = found["with_ablation"].cross_entropy
    return (ablated - found["with_sae"].cross_entropy) / (ablated - found["without_sae"].cross_entropy)


def _check(sae: TorchSAE, folder: Path, activations: Path) -> None:
    """Holds an export against `made.npy`, what its library itself made of the first activations."""
    import numpy as np
    import torch

    if not (folder / "made.npy").is_file():
        return
    made = np.load(folder / "made.npy")
    x = np.load(activations / "train.npy", mmap_mode="r")[: len(made)].copy()
    with torch.no_grad():
        distance = np.linalg.norm(sae(torch.from_numpy(x)).numpy() - made, axis=1) / np.linalg.norm(x, axis=1)
    if not np.mean(distance) < _SAME:
        raise ValueError(f"{folder}: the export reconstructs something else, {np.mean(distance):.2g} of |x| away")
