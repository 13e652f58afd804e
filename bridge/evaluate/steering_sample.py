"""Choose the latents that are steered, and read what steering them needs from text of its own."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from bridge.evaluate import concepts
from bridge.evaluate.site import Site
from bridge.evaluate.text import Text
from bridge.torch_sae import RANKED, TorchSAE

ROW = 128
"""Most tokens per row of the text that is measured."""
CALIBRATION_TOKENS = 32_768
"""Most tokens whose activations are kept for calibration."""
_CONCEPT_TOKENS = 65_536
_FEWEST_FIRINGS = 10


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics of separate text, read before anything is steered."""

    acts: Float32[np.ndarray, "N d"]
    counts: Bool[np.ndarray, " N"]
    top: Float[np.ndarray, " f"]
    """The greatest activation of each latent, in the units of `bridge.steering.Steer`."""
    firings: Int[np.ndarray, " f"]


def split(text: Text, tokens: int) -> tuple[Text, Int[np.ndarray, "R T"]]:
    """Return the first rows of a text, to calibrate on, and its last rows, cut to `ROW` tokens, to be measured."""
    count, length = text.tokens.shape
    if count < 2:
        raise ValueError("steering is measured on at least two rows of text: give more --heldout_tokens")
    measured = min(max(tokens // min(length, ROW), 1), count // 2)
    calibrating = max(min(count - measured, _CONCEPT_TOKENS // length), 1)
    return concepts.sample(text, calibrating), text.tokens[count - measured :, :ROW]


@torch.no_grad()
def calibrate(site: Site, sae: TorchSAE, text: Text) -> Calibration:
    """Return activations of a text, and how often and how strongly latents fire on it."""
    acts, counts = [], []
    top = torch.zeros(sae.d_sae, device=site.device)
    firings = torch.zeros(sae.d_sae, dtype=torch.int64, device=site.device)
    for _, _, x, _, mask in site.read(site.batches(text.tokens, sae.d_sae)):
        latents = sae.encode(x[mask].float())
        if len(latents):
            top = torch.maximum(top, latents.amax(0))
        firings += (latents > 0).sum(0)
        acts.append(x.float().flatten(0, 1).cpu().numpy())
        counts.append(mask.flatten().cpu().numpy())
    norm = 1.0 if sae.architecture in RANKED else sae.W_dec.float().norm(dim=1)
    return Calibration(np.concatenate(acts), np.concatenate(counts), (top * norm).cpu().numpy(), firings.cpu().numpy())


def chosen(sae: TorchSAE, calibration: Calibration, wanted: Sequence[int], sample_size: int) -> list[int]:
    """Return the latents to steer: those that were asked for, or a sample of those that fire.

    The sample is drawn evenly from the latents ordered by how often they fire, so that it stands for the SAE.

    Raises:
      ValueError: no such latent, or one that never fires or has no direction; or no latent fires.
    """
    directed = sae.W_dec.float().norm(dim=1).cpu().numpy() > 0
    for latent in wanted:
        if not 0 <= latent < sae.d_sae:
            raise ValueError(f"no latent {latent}: this SAE has latents 0 to {sae.d_sae - 1}")
        if not (calibration.top[latent] > 0 and directed[latent]):
            raise ValueError(f"latent {latent} never fires on the text, so its strengths are not known: choose others")
    if wanted:
        return list(dict.fromkeys(wanted))
    for fewest in (_FEWEST_FIRINGS, 1):
        alive = np.flatnonzero((calibration.firings >= fewest) & directed)
        if len(alive):
            ordered = alive[np.argsort(calibration.firings[alive], kind="stable")]
            places = (np.arange(sample_size) + 0.5) * len(ordered) / sample_size
            return [int(i) for i in dict.fromkeys(ordered[places.astype(int)].tolist())]
    raise ValueError("no latent fires on the text, so none can be steered")


@torch.no_grad()
def silent(site: Site, sae: TorchSAE, rows: np.ndarray, latents: Sequence[int]) -> Bool[Tensor, "n R T"]:
    """Return at which positions of the measured text each latent does not fire."""
    parts = []
    for _, _, x, _, mask in site.read(site.batches(rows, sae.d_sae)):
        parts.append((sae.encode(x.float())[..., list(latents)] <= 0) & mask[..., None])
    return torch.cat(parts).movedim(-1, 0)
