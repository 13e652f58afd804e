"""The SAEs of a run, one per variant and site of the model, with folder and hooks; the memory that they need."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridge import launch
from bridge.training import continuing, device, memory
from bridge.training.config import RunConfig
from jsae import export, rates
from jsae.loop import Member
from jsae.settings import require

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from bridge.nanochat import Nanochat
    from bridge.training.continuing import Starts
    from jsae.ops import Ops
    from jsae.pretrained import Description
    from jsae.store import Store


@dataclass(frozen=True)
class Trainee:
    """One SAE of a run."""

    variant: RunConfig
    """The settings of the run with the values of this SAE."""
    several_variants: bool
    """Whether the run has variants beside this one."""
    folder: Path
    """The directory of the run, or of the variant in it, which is a run directory of its own."""
    hooks: tuple[str, ...]
    """The hooks of its site: one, a transcoder's input and target, or a crosscoder's layers. A crosscoder over
    checkpoints reads one hook in all of them."""
    member: Member
    start: Description | None = None
    """The exported SAE that it continues."""

    @property
    def name(self) -> str:
        """Name of its export: the hook it reads; for a crosscoder the first hook with the numbers of all layers."""
        return _site_name(self.hooks)

    def with_rate(self, rate: float) -> Trainee:
        """Return the SAE with another learning rate."""
        train = dataclasses.replace(self.member.train, learning_rate=rate)
        return dataclasses.replace(self, member=self.member._replace(train=train))

    @property
    def label(self) -> str:
        """Variant and name, unique within the run."""
        variant = self.folder.name if self.several_variants else ""
        return " ".join(part for part in (variant, self.name) if part)


def _site_name(hooks: tuple[str, ...]) -> str:
    """Return the name of a site's exports."""
    numbers = dict.fromkeys(name.split(".")[1] for name in hooks) if len(hooks) > 1 else {}
    if len(numbers) < 2:
        return hooks[0]
    blocks, _, hook = hooks[0].split(".", 2)
    return f"{blocks}.{'-'.join(numbers)}.{hook}"


def trainees(run: Path, config: RunConfig, nano: Nanochat, starts: Starts | None = None) -> list[Trainee]:
    """Return the SAEs of a run.

    Args:
      run: its directory.
      config: its settings.
      nano: its model.
      starts: the exported SAEs that they continue; None: they are new.

    Raises:
      ConfigError: settings of an SAE that cannot work, or an architecture without an exported form.
      ValueError: a layer that the model does not have.
    """
    from bridge.hooks import find

    saes = trainees_of_sizes(run, config, nano.config.n_layer, nano.config.n_embd, starts)
    for hook in dict.fromkeys(hook for trainee in saes for hook in trainee.hooks):
        find(nano.model, hook)
    return saes


def trainees_of_sizes(
    run: Path, config: RunConfig, n_layer: int, n_embd: int, starts: Starts | None = None
) -> list[Trainee]:
    """Return the SAEs of a run on a model of some layers and width; arguments and errors are those of `trainees`."""
    hooks_of_sites = _hooks_of_sites(config, n_layer)
    widths = {hook: n_embd for hooks in hooks_of_sites for hook in hooks}
    return _trainees(run, config, hooks_of_sites, widths, starts)


def stored_trainees(run: Path, config: RunConfig, store: Store, starts: Starts | None = None) -> list[Trainee]:
    """Return the SAEs of a run on the activations of a store.

    Without `--layer` they read all of its hooks of the chosen type; a single hook of any name.

    Args:
      run: its directory.
      config: its settings.
      store: the store.
      starts: the exported SAEs that they continue; None: they are new.

    Raises:
      ConfigError: settings of an SAE that cannot work, hooks that the store does not have, or another model's store for
        flags that name a layer.
    """
    stored = _stored_layers(store, config.hook_type)
    if len(store.hooks) == 1 and not (config.layer or config.target_hook or config.crosscoder):
        hooks_of_sites = [tuple(store.hooks)]
    else:
        layers = config.layer if config.layer and config.layer != ("all",) else tuple(map(str, stored))
        require(bool(layers), f"{store.location} has no {config.hook_type}: it has {', '.join(store.hooks)}")
        hooks_of_sites = _hooks_of_sites(dataclasses.replace(config, layer=layers), 0)
    for hook in dict.fromkeys(hook for hooks in hooks_of_sites for hook in hooks):
        require(hook in store.hooks, f"{store.location} has no hook {hook}: it has {', '.join(store.hooks)}")
    return _trainees(run, config, hooks_of_sites, dict(store.hooks), starts)


def _stored_layers(store: Store, hook_type: str) -> list[int]:
    """Return the layers of which a store has a type of activation."""
    from bridge.hooks import parse

    layers = []
    for hook in store.hooks:
        with contextlib.suppress(ValueError):  # of another model
            layer, kind = parse(hook)
            layers += [layer] if kind == hook_type else []
    return sorted(layers)


def _trainees(
    run: Path,
    config: RunConfig,
    hooks_of_sites: list[tuple[str, ...]],
    widths: Mapping[str, int],
    starts: Starts | None,
) -> list[Trainee]:
    """Return an SAE for every variant and site; `widths` are those of the hooks."""
    saes = []
    for variant in config.variants():
        folder = run / config.variant_name(variant)
        for site, hooks in enumerate(hooks_of_sites):
            sizes = [widths[hook] for hook in hooks]
            require(len(set(sizes)) == 1, f"{', '.join(hooks)} have different widths, {sizes}: train on one of them")
            layers = len(hooks) if config.crosscoder else max(len(config.stages), 1)
            start = None if starts is None else starts.description(_site_name(hooks))
            sae = variant.sae_config(sizes[0], layers, start)
            if start is not None:
                continuing.check(start, sae)
            export.architecture(sae)
            variant.train_config().anneals(sae)
            member = Member(sae, variant.train_config(), site)
            saes.append(Trainee(variant, folder != run, folder, hooks, member, start))
    return saes


def at_once(config: RunConfig, trainees: list[Trainee]) -> list[Trainee]:
    """Return the SAEs that are trained together at most: with `find_lr` copies of them at several rates."""
    copies = len(rates.AROUND) if config.find_lr and not config.resume else 1
    return trainees * copies


def mesh_shape(config: RunConfig) -> tuple[int, int]:
    """Return how many processes divide the batch and the latents, before jax starts; one where that is not known."""
    launched = launch.detected()
    count = (launched.count if launched is not None else 1) or 1
    return max(count // config.latent_shards, 1), min(config.latent_shards, count)


def mesh(config: RunConfig, trainees: list[Trainee]) -> Mesh | None:
    """Return the devices of all processes, over which every SAE is divided; None where there is one process.

    Raises:
      ConfigError: processes or latents that cannot be divided so.
    """
    from jsae import axes, processes

    count, shards = processes.count(), config.latent_shards
    if count == 1:
        require(
            shards == 1, f"--latent_shards={shards} is for several processes, and this is one: start them by torchrun"
        )
        return None
    require(count % shards == 0, f"{count} processes cannot be divided by --latent_shards={shards}")
    latents = trainees[0].member.sae.d_sae
    require(latents % shards == 0, f"{latents} latents cannot be divided by --latent_shards={shards}")
    return axes.make_mesh(shards)


def sites(trainees: list[Trainee]) -> list[tuple[str, ...]]:
    """Return the hooks of every site, in the order of the sites' numbers."""
    return list({trainee.member.site: trainee.hooks for trainee in trainees}.values())


def _hooks_of_sites(config: RunConfig, n_layer: int) -> list[tuple[str, ...]]:
    """Return the hooks of every site; every variant has one SAE per site."""
    from bridge.hooks import hook_name

    layers = config.layers(n_layer)
    if config.crosscoder:
        return [tuple(hook_name(layer, config.hook_type) for layer in layers)]
    types = [config.hook_type] + ([config.target_hook] if config.target_hook else [])
    return [tuple(hook_name(layer, hook_type) for hook_type in types) for layer in layers]


def check_memory(
    config: RunConfig,
    trainees: list[Trainee],
    width: int,
    available: int | None,
    ops: Ops | None = None,
    reason: str = "",
) -> None:
    """Check that the arrays of a run fit into the memory of its device.

    Args:
      config: the run.
      trainees: its SAEs.
      width: of the model's residual stream.
      available: bytes of memory, on a GPU those of jax's part; None if unknown, which skips the check.
      ops: the implementation of operations on a GPU; None is the one of the device.
      reason: why it was chosen.

    Raises:
      ConfigError: they do not fit; says how much is needed and how much there is.
    """
    if available is None:
        return
    if config.device != "cpu":
        check_gpu_memory(trainees, available, ops, reason, mesh_shape(config))
        return
    launched = launch.detected()  # processes of a host share its memory
    data = 1 if launched is None else max(launched.local_count // config.latent_shards, 1)  # copies of the weights
    saes = [trainee.member.sae for trainee in trainees]
    weights = sum(4 * sae.d_sae * (sae.d_in + sae.width_out) for sae in saes)
    copies = (5 + (config.average_fraction is not None)) * data  # weights, gradients, two moments, what is saved
    batch = 2 * 4 * config.batch_size * max(sae.d_sae for sae in saes)
    blocks = 3 * 4 * config.block_size * width * _arrays(config, trainees)
    needed = copies * weights + batch + blocks
    require(
        needed <= available,
        f"{len(saes)} SAEs need about {needed / 2**30:.1f} GiB ({copies} x {weights / 2**30:.2f} of weights, "
        f"{batch / 2**30:.2f} for latents of a batch, {blocks / 2**30:.2f} for blocks of activations), and there are "
        f"{available / 2**30:.1f}: train fewer together, or lower --expansion_factor, --batch_size or --block_size",
    )


def check_gpu_memory(
    trainees: list[Trainee],
    available: int,
    ops: Ops | None = None,
    reason: str = "",
    mesh: tuple[int, int] = (1, 1),
) -> None:
    """Check that SAEs fit into jax's part of a GPU.

    Args:
      trainees: the SAEs.
      available: bytes of that part.
      ops: the implementation; None is the one of the device.
      reason: why it was chosen.
      mesh: GPUs that divide the batch, and that divide the latents.

    Raises:
      ConfigError: they do not fit; names the flag that lowers the largest part of what they need.
    """
    need = memory.of_steps([trainee.member for trainee in trainees], ops, mesh=mesh)
    of_weights, of_batches = need.state + need.saved + need.gradients, need.batch + need.latents
    remedies = ["--batch_size" if of_batches > of_weights else "--expansion_factor"]
    remedies += ["the number of SAEs"] if len(trainees) > 1 and of_weights >= of_batches else []
    member = trainees[0].member
    shards = ", or --latent_shards" if mesh[0] > 1 and of_weights >= of_batches else ""
    without = (ops or member.ops).name != "gpu" and (member.sae.sae.sparse or member.sae.sae.maps)
    kernels = f". With Triton kernels they would need less ({reason or 'extra [cuda]'})" if without else ""
    require(
        need.total <= available,
        f"{len(trainees)} SAEs need about {need.total / 2**30:.1f} GiB of the GPU ({of_weights / 2**30:.1f} for "
        f"weights, moments, gradients and the copy that is saved, {need.batch / 2**30:.1f} for a batch, "
        f"{need.latents / 2**30:.1f} for its latents), and jax has {available / 2**30:.1f}: lower "
        f"{' or '.join(remedies)}; where torch can spare memory, raise --jax_memory_fraction{shards}{kernels}",
    )


def jax_fraction(config: RunConfig, trainees: list[Trainee], nano: Nanochat | None) -> float:
    """Return jax's fraction of the GPU's memory: the one that was given, or what the run's SAEs need.

    Raises:
      ConfigError: the GPU has not enough free memory for the run.
    """
    if config.device == "cpu":
        return 1.0
    import torch

    free, card = torch.cuda.mem_get_info()
    torch_need = 2**28  # an exported SAE that is measured
    if nano is not None:
        itemsize = nano.model.lm_head.weight.element_size()
        row_len = config.context_size or nano.config.sequence_len
        torch_need = stream_memory(config, nano.config.n_embd, itemsize, row_len, _arrays(config, trainees))
    jax_need = saes_memory(config, trainees)
    check_card(card, free, torch.cuda.memory_reserved(), jax_need, torch_need)
    if config.jax_memory_fraction is not None:
        return config.jax_memory_fraction
    fraction = device.jax_fraction(card, free, jax_need, torch_need)
    print(
        f"jax takes {fraction * card / 2**30:.1f} of the GPU's {card / 2**30:.1f} GiB (--jax_memory_fraction="
        f"{fraction:.3f}), torch has the rest",
        flush=True,
    )
    return fraction


def check_card(card: int, free: int, own: int, jax_need: int, torch_need: int) -> None:
    """Check that a GPU has room for a run, before jax starts.

    Args:
      card: bytes of the GPU.
      free: bytes of it that are free, with the model on it.
      own: bytes that torch has taken in this process, for the model.
      jax_need: bytes that jax is predicted to need.
      torch_need: bytes that torch is predicted to need beside the model.

    Raises:
      ConfigError: there is no room; names the flags that lower the larger need, and another process on the GPU.
    """
    others = card - free - own
    shared = f" (about {others / 2**30:.1f} are taken outside this run: nvidia-smi names processes)"
    flags = "--expansion_factor or --batch_size" if jax_need > torch_need else "--tokens_per_forward or --block_size"
    require(
        jax_need + torch_need <= free,
        f"the run needs about {(jax_need + torch_need) / 2**30:.1f} GiB of the GPU beside its model "
        f"({jax_need / 2**30:.1f} for its SAEs, {torch_need / 2**30:.1f} for activations), and {free / 2**30:.1f} of "
        f"{card / 2**30:.1f} are free{shared if others > card / 10 else ''}: lower {flags}",
    )


def saes_memory(config: RunConfig, trainees: list[Trainee]) -> int:
    """Return the bytes that jax needs on a GPU: for steps of all SAEs, or for the first look at a block."""
    members = [trainee.member for trainee in trainees]
    ops = memory.likely_ops(config.matmul_dtype, memory.kernels_are_likely())
    mesh = mesh_shape(config)
    first = memory.of_first_block(members, min(config.block_size, memory.SAMPLE), mesh[1])
    return max(memory.of_steps(members, ops, mesh=mesh).total, first)


def stream_memory(config: RunConfig, width: int, itemsize: int, row_len: int, hooks: int) -> int:
    """Return the bytes that torch needs on a GPU beside the model: blocks of activations, and a forward pass.

    A pass holds about 24 arrays of the width of the stream at once, most of them in an MLP; a windowed layer that is
    not compiled also holds a mask.

    Args:
      config: the run.
      width: of the model's residual stream.
      itemsize: bytes of one of its numbers.
      row_len: tokens of a row.
      hooks: number of hooks that are captured.
    """
    tokens = max(config.tokens_per_forward, row_len)
    own_block = config.block_size // math.prod(mesh_shape(config))
    blocks = 3 * own_block * width * itemsize * hooks  # one that is read, one that is filled, and its order
    return blocks + (24 + hooks) * tokens * width * itemsize + 4 * row_len**2


def _arrays(config: RunConfig, trainees: list[Trainee]) -> int:
    """Return the number of activations that are captured: hooks, times the checkpoints in which they are read."""
    return len({hook for trainee in trainees for hook in trainee.hooks}) * max(len(config.stages), 1)


def available_memory(config: RunConfig) -> int | None:
    """Return the bytes that jax may use on the run's device; None if unknown."""
    if config.device == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
