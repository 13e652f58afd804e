"""Which SAEs a run trains: every variant at every place of the model, each with its folder and its hooks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.training.config import RunConfig
from jsae import export
from jsae.loop import Member
from jsae.settings import require

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat


@dataclass(frozen=True)
class Trainee:
    """One SAE of a run."""

    variant: RunConfig
    """The flags that made it, with one value each."""
    variant_named: bool
    """Whether the run has several variants."""
    folder: Path
    """The run, or the variant's folder in it: what commands take as a run directory."""
    hooks: tuple[str, ...]
    """What it reads: one hook, a transcoder's input and target, a crosscoder's layers."""
    member: Member

    @property
    def name(self) -> str:
        """Of its export: the hook it reads, or that of a crosscoder's first layer with all their numbers."""
        if self.member.sae.layers == 1:
            return self.hooks[0]
        first, numbers = self.hooks[0].split(".", 2), [hook.split(".")[1] for hook in self.hooks]
        return f"{first[0]}.{'-'.join(numbers)}.{first[2]}"

    @property
    def label(self) -> str:
        """What sets it apart from the others of its run."""
        variant = self.folder.name if self.variant_named else ""
        return " ".join(part for part in (variant, self.name) if part)


def trainees(run: Path, config: RunConfig, nano: Nanochat) -> list[Trainee]:
    """Return the SAEs of a run.

    Raises:
      ConfigError: settings of an SAE that cannot work, or an architecture without an exported form.
      ValueError: a layer that the model does not have.
    """
    from bridge.hooks import find

    places = _places(config, nano.config.n_layer)
    for hook in dict.fromkeys(hook for place in places for hook in place):
        find(nano.model, hook)
    found = []
    for variant in config.variants():
        folder = run / config.variant_name(variant)
        for site, hooks in enumerate(places):
            sae = variant.sae_config(nano.config.n_embd, len(hooks) if config.crosscoder else 1)
            export.architecture(sae)
            variant.train_config().anneals(sae)
            found.append(Trainee(variant, folder != run, folder, hooks, Member(sae, variant.train_config(), site)))
    return found


def sites(trainees: list[Trainee]) -> list[tuple[str, ...]]:
    """The hooks of every site, in the order in which members number them."""
    return list({trainee.member.site: trainee.hooks for trainee in trainees}.values())


def _places(config: RunConfig, n_layer: int) -> list[tuple[str, ...]]:
    """For every SAE of a variant its hooks."""
    from bridge.hooks import hook_name

    layers = config.layers(n_layer)
    if config.crosscoder:
        return [tuple(hook_name(layer, config.hook_type) for layer in layers)]
    ends = [config.hook_type] + ([config.target_hook] if config.target_hook else [])
    return [tuple(hook_name(layer, end) for end in ends) for layer in layers]


def check_memory(config: RunConfig, trainees: list[Trainee], width: int, available: int | None) -> None:
    """Refuses a run whose arrays cannot fit, before it starts.

    Raises:
      ConfigError: says how much of what is needed, and how much there is.
    """
    if available is None:
        return
    saes = [trainee.member.sae for trainee in trainees]
    weights = sum(4 * sae.d_sae * (sae.d_in + sae.width_out) for sae in saes)
    copies = 5 + (config.average_fraction is not None)  # weights, gradients, two moments, the copy that is saved
    batch = 2 * 4 * config.batch_size * max(sae.d_sae for sae in saes)
    blocks = 3 * 4 * config.block_size * width * len({hook for trainee in trainees for hook in trainee.hooks})
    needed = copies * weights + batch + blocks
    require(
        needed <= available,
        f"{len(saes)} SAEs need about {needed / 2**30:.1f} GiB ({copies} x {weights / 2**30:.2f} of weights, "
        f"{batch / 2**30:.2f} for latents of a batch, {blocks / 2**30:.2f} for blocks of activations), and there are "
        f"{available / 2**30:.1f}: train fewer together, or lower --expansion_factor, --batch_size or --block_size",
    )


def available_memory(config: RunConfig) -> int | None:
    """Bytes that jax may use on the run's device; None where nothing says it."""
    if config.device == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
