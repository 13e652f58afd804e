"""Subjects of the quality measurements: training rows in a file, and the scores of an SAE trained on them."""

from __future__ import annotations

import dataclasses
import functools
import math
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benches import quality_sides

if TYPE_CHECKING:
    import numpy as np

    from bridge.evaluate import Site
    from bridge.evaluate.labels import Material
    from bridge.evaluate.text import Text
    from bridge.nanochat import Nanochat
    from bridge.nanochat.tokenizer import Tokenizer
    from jsae.synthetic import Samples, SyntheticWorld

SMOLLM2_CACHE = "~/.cache/jsae/smollm2-1"
"""Activations of SmolLM2, by their number."""

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Subject:
    """Data that SAEs are trained on, and their scores."""

    title: str
    folder: Path
    """Holds `train.npy`, the rows that every trainer reads from first to last."""
    d_in: int
    scores: Callable[[Path], Scores]
    """Scores of an exported SAE; at least `fvu`, `l0` and `dead_fraction`."""
    chosen_by: str = "fvu"
    """The score at equal L0 that chooses a learning rate: the lowest `fvu`, or the highest of another score."""
    final_scores: Callable[[Path], Scores] = lambda folder: {}
    """Scores that take longer: of the SAEs that are reported only."""
    train: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Does a job of jsae's; None trains on `train.npy`."""

    def cost(self, scores: Scores) -> float:
        """Return the number that the choice minimises."""
        return scores[self.chosen_by] if self.chosen_by == "fvu" else -scores[self.chosen_by]


def nanochat(
    folder: Path,
    *,
    checkpoint: str,
    data: str,
    layer: str,
    site: str,
    train: int,
    heldout: int,
    loss: int,
    interpretability: bool = False,
) -> Subject:
    """Write shuffled activations of a nanochat.

    Args:
      folder: to write to.
      checkpoint: of the nanochat.
      data: text for the checkpoint.
      layer: "first", "middle" or "last".
      site: short name of the hook, such as "resid_post".
      train: number of activations to train on.
      heldout: number of held-out activations to score on, or fewer if the text is short.
      loss: number of held-out tokens to measure the loss on.
      interpretability: whether to score detection by labels, probes of single latents and absorption too.
    """
    import numpy as np

    import bridge.nanochat
    from bridge.evaluate import Site
    from bridge.hooks import hook_name
    from bridge.nanochat.corpus import Corpus

    nano = bridge.nanochat.load(checkpoint)
    excluded, row_len = (nano.tokenizer.bos_token_id,), nano.config.sequence_len
    last = nano.config.n_layer - 1
    number = {"first": 0, "middle": last // 2, "last": last}[layer]
    name = hook_name(number, site)
    reader = Site(nano.model, name, excluded)
    corpus, heldout_corpus = (Corpus(data, nano.tokenizer, split=s, row_len=row_len) for s in ("train", "heldout"))
    endless = (corpus.next_rows(max(reader.tokens_per_forward // row_len, 1)) for _ in iter(int, 1))
    acts = _gathered(reader, endless, train)
    np.save(folder / "train.npy", acts[np.random.default_rng(0).permutation(len(acts))])
    rows = np.stack(list(heldout_corpus.one_pass(-(-heldout // row_len))))
    held = _gathered(reader, reader.batches(rows), heldout)
    turn = threading.Lock()
    final: Callable[[Path], Scores] = functools.partial(
        _loss_recovered,
        site=reader,
        rows=rows[: max(loss // row_len, 1)],
        mean=held.mean(0),
        token_bytes=np.asarray(nano.tokenizer.token_bytes),
        turn=turn,
    )
    if interpretability:
        final = functools.partial(_both, final, _Reading.of(nano, reader, data, heldout, turn).scores)
    return Subject(
        f"nanochat {checkpoint}, {name}",
        folder,
        held.shape[1],
        functools.partial(quality_sides.score, activations=folder, heldout=held),
        final_scores=final,
    )


def smollm2(python: Path, train: int, heldout: int) -> Subject:
    """Collect activations of SmolLM2-135M-Instruct in the middle of its layers, once; later calls find them.

    Args:
      python: interpreter of the environment of the other trainers, which has the model.
      train: number of activations to train on.
      heldout: number of held-out activations to score on.

    Raises:
      OSError: they could not be collected.
    """
    import numpy as np

    from jsae import files

    folder = Path(f"{SMOLLM2_CACHE}-{train}-{heldout}").expanduser()
    if not folder.is_dir():
        script = Path(__file__).with_name("smollm2_peer.py")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing_folder(folder) as partial:
            call = [str(python), str(script), str(partial), str(train), str(heldout)]
            if subprocess.run(call, check=False).returncode:
                raise OSError(f"activations of SmolLM2 could not be collected: `{' '.join(call)}` failed")
    held = np.load(folder / "heldout.npy")
    return Subject(
        "SmolLM2-135M-Instruct, residual stream after layer 15 of 30",
        folder,
        held.shape[1],
        functools.partial(quality_sides.score, activations=folder, heldout=held),
    )


def synthetic(folder: Path, world: SyntheticWorld, train: int, heldout: int, chosen_by: str) -> Subject:
    """Write activations of a synthetic world; SAEs are also scored by how well they recover its features.

    Args:
      folder: to write to.
      world: the world.
      train: number of activations to train on.
      heldout: number of held-out samples to score on.
      chosen_by: the score that chooses a learning rate.
    """
    import numpy as np

    from jsae import recovery

    np.save(folder / "train.npy", np.asarray(world.sample(0, train).activations))
    samples = list(recovery.heldout(world, heldout))
    return Subject(
        _title(world),
        folder,
        world.d_in,
        functools.partial(_recovery, world=world, num_samples=heldout, activations=folder, samples=samples),
        chosen_by,
    )


def endless(folder: Path, world: SyntheticWorld, heldout: int, chosen_by: str) -> Subject:
    """Return a synthetic world as a subject of which no rows are written: jsae samples batches on its device."""
    return Subject(
        _title(world),
        folder,
        world.d_in,
        functools.partial(_recovery, world=world, num_samples=heldout, activations=folder),
        chosen_by,
        train=functools.partial(quality_sides.train_on_world, world=world),
    )


def _title(world: SyntheticWorld) -> str:
    return f"synthetic world of {world.config.num_features:,} features in {world.d_in} dimensions"


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


def _loss_recovered(
    folder: Path,
    site: Site,
    rows: np.ndarray,
    mean: np.ndarray,
    token_bytes: np.ndarray,
    turn: AbstractContextManager[object],
) -> Scores:
    """Return (ablated - spliced) / (ablated - original), of the model's cross-entropy.

    The activations are replaced by zeros in the ablated model, by their reconstruction in the spliced one. `turn` is
    held meanwhile: a model has one set of hooks, and contests work side by side.
    """
    from bridge import torch_sae
    from bridge.evaluate.splice import effects

    sae, batches = torch_sae.load(folder), site.batches(rows, len(token_bytes))
    with turn:
        losses = effects(site, sae, batches, mean, token_bytes)
    ablated = losses["with_ablation"].cross_entropy
    recovered = ablated - losses["with_sae"].cross_entropy
    return {"loss_recovered": recovered / (ablated - losses["without_sae"].cross_entropy)}


def _both(first: Callable[[Path], Scores], second: Callable[[Path], Scores], folder: Path) -> Scores:
    return first(folder) | second(folder)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Held-out text that the latents of SAEs are read on, and what may describe them: the same for all SAEs."""

    site: Site
    text: Text
    material: Material
    tokenizer: Tokenizer
    turn: AbstractContextManager[object]
    """Held while the model runs, as in `_loss_recovered`."""

    @classmethod
    def of(cls, nano: Nanochat, site: Site, data: str, heldout: int, turn: AbstractContextManager[object]) -> _Reading:
        """Return about as many held-out tokens as SAEs are scored on."""
        from bridge.evaluate import labels, text
        from bridge.evaluate.site import remembering

        documents = text.documents(data, "heldout", nano.tokenizer)
        rows = text.read(documents, nano.tokenizer, nano.config.sequence_len, heldout)
        material = labels.Material.of_text(rows, nano.tokenizer)
        return cls(remembering(site, rows.tokens), rows, material, nano.tokenizer, turn)

    def scores(self, folder: Path) -> Scores:
        """Return the mean F1 of detection by labels, the accuracy of probes of one latent, and the absorbed fraction.

        One that the text is too short for is NaN.
        """
        from bridge import torch_sae
        from bridge.evaluate import absorption, classes, labels, probing

        sae = torch_sae.load(folder)
        with self.turn:
            fired = labels.firings(self.site, sae, self.text)
            places = classes.token_examples(self.site, sae, self.text)
            letters = classes.letter_examples(self.site, sae, self.text, self.tokenizer)
        probes = probing.sparse_probing(places, (1,)) if places else {}
        W_dec, b_dec = sae.W_dec.numpy(), sae.b_dec.numpy()
        found = {
            "detection": labels.detection(labels.search(fired, self.material))["f1"],
            "probing": probes.get("sae_top_1_test_accuracy"),
            "absorption": absorption.absorption(letters, W_dec, b_dec)["fraction"] if letters else None,
        }
        return {name: math.nan if value is None else value for name, value in found.items()}


def _recovery(
    folder: Path,
    world: SyntheticWorld,
    num_samples: int,
    activations: Path,
    samples: Sequence[Samples] | None = None,
) -> Scores:
    """Return all scores of recovery of an exported SAE; `samples` are the held-out ones, None makes them."""
    import jsae
    from jsae import recovery

    quality_sides.check(folder, activations)
    found = recovery.scores(jsae.load(folder), world, num_samples, samples=samples)
    return {name: float(value) for name, value in found.to_json().items()}
