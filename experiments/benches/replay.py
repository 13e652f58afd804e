"""A model that gives activations which are there already: sparsify's Trainer asks a model for what it trains on.

torch alone: scripts of other environments import it from beside them.
"""

from collections.abc import Callable

import torch
from torch import nn


class Replay(nn.Module):
    """A model whose layer `site` puts out `give(input_ids)`, activations of the shape (..., d)."""

    dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}  # noqa: RUF012 - the Trainer asks for the width

    def __init__(self, give: Callable[[torch.Tensor], torch.Tensor], device: str = "cpu"):
        super().__init__()
        self.site = nn.Identity()
        self.device = torch.device(device)
        self._give = give

    @property
    def base_model(self) -> nn.Module:
        """Itself: the Trainer looks for its layers here."""
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The activations, by way of `site`."""
        return self.site(self._give(input_ids))
