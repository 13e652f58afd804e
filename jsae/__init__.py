"""Sparse autoencoders in JAX: train on any activations, save, load. No torch, no flags; prints only progress asked for.

The names below are imported when they are first used, so that `import jsae` is quick.
"""

from typing import TYPE_CHECKING

from jsae import lazy

__version__ = "0.2.0"

if TYPE_CHECKING:
    from jsae import recovery, store, synthetic, testing
    from jsae.architectures import (
        ARCHITECTURES,
        SAE,
        AbsTopK,
        BatchTopK,
        Context,
        Forward,
        Gated,
        JumpReLU,
        Matryoshka,
        ReLU,
        SAEConfig,
        TopK,
        sae_config,
    )
    from jsae.arrays import ArraySource, StreamSource
    from jsae.checkpoint import Checkpoints
    from jsae.config import TrainConfig
    from jsae.data import Source
    from jsae.health import ActivationsError, DegenerateError, DivergedError, NotFiniteError
    from jsae.locks import LockedError
    from jsae.manifest import DamagedError
    from jsae.settings import ConfigError
    from jsae.trained import TrainedSAE, load
    from jsae.training import Progress, find_lr, fit, train

_PLACES = {
    "ARCHITECTURES": "jsae.architectures:ARCHITECTURES",
    "AbsTopK": "jsae.architectures:AbsTopK",
    "ActivationsError": "jsae.health:ActivationsError",
    "ArraySource": "jsae.arrays:ArraySource",
    "BatchTopK": "jsae.architectures:BatchTopK",
    "Checkpoints": "jsae.checkpoint:Checkpoints",
    "ConfigError": "jsae.settings:ConfigError",
    "Context": "jsae.architectures:Context",
    "DamagedError": "jsae.manifest:DamagedError",
    "DegenerateError": "jsae.health:DegenerateError",
    "DivergedError": "jsae.health:DivergedError",
    "Forward": "jsae.architectures:Forward",
    "Gated": "jsae.architectures:Gated",
    "JumpReLU": "jsae.architectures:JumpReLU",
    "LockedError": "jsae.locks:LockedError",
    "Matryoshka": "jsae.architectures:Matryoshka",
    "NotFiniteError": "jsae.health:NotFiniteError",
    "Progress": "jsae.training:Progress",
    "ReLU": "jsae.architectures:ReLU",
    "SAE": "jsae.architectures:SAE",
    "SAEConfig": "jsae.architectures:SAEConfig",
    "Source": "jsae.data:Source",
    "StreamSource": "jsae.arrays:StreamSource",
    "TopK": "jsae.architectures:TopK",
    "TrainConfig": "jsae.config:TrainConfig",
    "TrainedSAE": "jsae.trained:TrainedSAE",
    "find_lr": "jsae.training:find_lr",
    "fit": "jsae.training:fit",
    "load": "jsae.trained:load",
    "recovery": "jsae.recovery",
    "sae_config": "jsae.architectures:sae_config",
    "store": "jsae.store",
    "synthetic": "jsae.synthetic",
    "testing": "jsae.testing",
    "train": "jsae.training:train",
}
"""Where every public name is: module:name."""

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "AbsTopK",
    "ActivationsError",
    "ArraySource",
    "BatchTopK",
    "Checkpoints",
    "ConfigError",
    "Context",
    "DamagedError",
    "DegenerateError",
    "DivergedError",
    "Forward",
    "Gated",
    "JumpReLU",
    "LockedError",
    "Matryoshka",
    "NotFiniteError",
    "Progress",
    "ReLU",
    "SAEConfig",
    "Source",
    "StreamSource",
    "TopK",
    "TrainConfig",
    "TrainedSAE",
    "find_lr",
    "fit",
    "load",
    "recovery",
    "sae_config",
    "store",
    "synthetic",
    "testing",
    "train",
]

__getattr__, __dir__ = lazy.names(__name__, _PLACES)
