"""The other trainers of SAEs, adapted once for all measurements. Imported from beside a script that has no jsae.

Settings that are not given here or by the caller are the libraries' defaults.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify", "torch", "numpy")
"""Packages whose versions belong to a measurement."""


@dataclass(frozen=True)
class Shape:
    """Architecture and sizes of an SAE, size of a batch, and the device."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    widths: tuple[int, ...]
    """Matryoshka's nested widths; the last is `d_sae`."""
    batch: int
    device: str = "cpu"


def saelens(
    shape: Shape, num_steps: int, batches: Iterator[Any], sae: Mapping[str, Any] | None = None, **training: Any
) -> Any:
    """Return an SAETrainer of SAELens, with its SAE in `trainer.sae`.

    Args:
      shape: of the SAE.
      num_steps: length of the run.
      batches: activations, (batch, d_in) each.
      sae: further fields of the SAE's config.
      training: further fields of SAETrainerConfig.
    """
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    forms: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopK", {"k": shape.k}),
        "batchtopk": ("BatchTopK", {"k": float(shape.k)}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": float(shape.k), "matryoshka_widths": list(shape.widths)}),
        "relu": ("Standard", {}),
        "gated": ("Gated", {}),
        "jumprelu": ("JumpReLU", {}),
    }
    kind, selection = forms[shape.architecture]
    widths = {"d_in": shape.d_in, "d_sae": shape.d_sae, "device": shape.device}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(**widths, **selection, **(sae or {}))
    trainer_config = SAETrainerConfig(
        total_training_samples=num_steps * shape.batch,
        train_batch_size_samples=shape.batch,
        lr_end=1e-5,  # required; a constant rate does not use it
        device=shape.device,
        **training,
    )
    return SAETrainer(trainer_config, getattr(sae_lens, f"{kind}TrainingSAE")(config).to(shape.device), batches)


def dictionary_learning(shape: Shape, num_steps: int, variant: str = "") -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a trainer class of dictionary_learning and its arguments.

    Args:
      shape: of the SAE.
      num_steps: length of the run.
      variant: "april" selects the updated ReLU trainer.
    """
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    fractions = [(end - start) / shape.d_sae for start, end in itertools.pairwise([0, *shape.widths])]
    standard_trainer = standard.StandardTrainerAprilUpdate if variant == "april" else standard.StandardTrainer
    trainers: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "topk": (top_k.TopKTrainer, {"k": shape.k}),
        "batchtopk": (batch_top_k.BatchTopKTrainer, {"k": shape.k}),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            {"k": shape.k, "group_fractions": fractions},
        ),
        "relu": (standard_trainer, {}),
        "gated": (gdm.GatedSAETrainer, {}),
        "jumprelu": (jumprelu.JumpReluTrainer, {}),
    }
    trainer, selection = trainers[shape.architecture]
    return trainer, {
        "steps": num_steps,
        "activation_dim": shape.d_in,
        "dict_size": shape.d_sae,
        "layer": 0,
        "lm_name": "nanochat",
        "device": shape.device,
        **selection,
    }


def sparsify(
    shape: Shape,
    num_steps: int,
    dataset: Iterable[Any],
    activations: Callable[[torch.Tensor], torch.Tensor],
    *,
    optimizer: str,
    seed: int = 0,
    **training: Any,
) -> Any:
    """Return a Trainer of sparsify, which saves nothing before the end of the run.

    Args:
      shape: of the SAE; sparsify knows TopK only.
      num_steps: length of the run.
      dataset: its items have `input_ids`.
      activations: function from `input_ids` to activations, (..., d_in).
      optimizer: "adam" or "signum".
      seed: of the weights.
      training: further fields of TrainConfig.
    """
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    config = TrainConfig(
        SparseCoderConfig(num_latents=shape.d_sae, k=shape.k),
        batch_size=1,
        optimizer=optimizer,
        hookpoints=["site"],
        init_seeds=[seed],
        log_to_wandb=False,
        save_every=num_steps + 2,
        **training,
    )
    return Trainer(config, dataset, _Replay(activations, shape.device))


class _Replay(nn.Module):
    """A model whose layer `site` outputs given activations: sparsify's Trainer reads activations from a model."""

    dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}  # noqa: RUF012 - the Trainer asks for the width

    def __init__(self, activations: Callable[[torch.Tensor], torch.Tensor], device: str):
        super().__init__()
        self.site = nn.Identity()
        self.device = torch.device(device)
        self._activations = activations

    @property
    def base_model(self) -> nn.Module:
        """The model itself: the Trainer looks for its layers here."""
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the activations, passed through `site`."""
        return self.site(self._activations(input_ids))
