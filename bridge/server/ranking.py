"""Find the latents that fire most on a text, without holding all latents at all of its tokens in memory."""

from collections.abc import Sequence
from typing import Any

import torch

from bridge.server.session import Acts, parts
from bridge.torch_sae import TorchSAE


class Strongest:
    """The largest activation of every latent of an SAE on a text, its position, and the sum over some tokens.

    Args:
      sae: the SAE.
      acts: activations of the text at its hook, (1, T, C).
      sort: the positions over which `sums` are taken; a repeated position counts repeatedly.
      ignore_bos: whether activations at the first token count as 0.
    """

    def __init__(self, sae: TorchSAE, acts: Acts, sort: Sequence[int], ignore_bos: bool):
        self._sae, self._acts, self._ignore_bos = sae, acts, ignore_bos
        self._sorted = bool(sort)
        self.maxima = acts.new_full((sae.d_sae,), -torch.inf, dtype=torch.float32)
        self.where = torch.zeros(sae.d_sae, dtype=torch.int64, device=acts.device)
        self.sums = torch.zeros_like(self.maxima)
        for start, latents in self._latents():
            maxima, where = latents.max(dim=0)
            larger = maxima > self.maxima
            self.maxima = torch.where(larger, maxima, self.maxima)
            self.where = torch.where(larger, where + start, self.where)
            positions = [i - start for i in sort if start <= i < start + len(latents)]
            self.sums += latents[positions].sum(0)

    @property
    def keys(self) -> torch.Tensor:
        """The values by which latents are ranked, (d_sae,)."""
        return self.sums if self._sorted else self.maxima

    def first(self, most: int) -> list[tuple[float, int]]:
        """Return the largest keys and their latents: only keys above 0, largest first, ties by lower index."""
        keys, order = torch.sort(self.keys, descending=True, stable=True)
        return [(key, i) for key, i in zip(keys[:most].tolist(), order[:most].tolist(), strict=True) if key > 0]

    def rows(self, source: str, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return Neuronpedia's rows of some latents, in the given order; the text is encoded again for their values."""
        values = torch.cat([latents[:, list(indices)] for _, latents in self._latents()]).T
        return [
            {
                "source": source,
                "index": i,
                "values": row.tolist(),
                "sumValues": float(self.sums[i]),
                "maxValue": float(self.maxima[i]),
                "maxValueIndex": int(self.where[i]),
            }
            for i, row in zip(indices, values, strict=True)
        ]

    def _latents(self) -> Any:
        """Yield the first position of each part of the text, and the latents there."""
        start = 0
        for part in parts(self._acts):
            latents = self._sae.encode(part)
            if start == 0 and self._ignore_bos:
                latents[0] = 0
            yield start, latents
            start += len(part)


def strongest(sources: Sequence[str], rankings: Sequence[Strongest], most: int) -> list[dict[str, Any]]:
    """Return rows of the latents of several sources with the largest keys, largest first, ties by earlier source."""
    ranked = [(key, which, i) for which, ranking in enumerate(rankings) for key, i in ranking.first(most)]
    ranked.sort(key=lambda entry: -entry[0])
    ranked = ranked[:most]
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for which, ranking in enumerate(rankings):
        indices = [i for _, source, i in ranked if source == which]
        if indices:
            rows |= {(which, row["index"]): row for row in ranking.rows(sources[which], indices)}
    return [rows[which, i] for _, which, i in ranked]
