"""The PyTorch side: nanochat, its hooks, training on its activations, exported SAEs as torch modules, steering.

The names below are imported when they are first used, so that `import bridge` is quick.
"""

from typing import TYPE_CHECKING

from jsae import lazy

if TYPE_CHECKING:
    from bridge.finetuning import FinetuneConfig, finetune
    from bridge.handover import to_jax, to_torch
    from bridge.hooks import capture, edit
    from bridge.nanochat.checkpoint import Nanochat, load
    from bridge.run import Run
    from bridge.runtime import InterpretableModel, load_saes
    from bridge.steering import Steer
    from bridge.torch_sae import TorchSAE
    from bridge.torch_sae import load as load_sae
    from bridge.training import RunConfig, train

_PLACES = {
    "FinetuneConfig": "bridge.finetuning:FinetuneConfig",
    "InterpretableModel": "bridge.runtime:InterpretableModel",
    "Nanochat": "bridge.nanochat.checkpoint:Nanochat",
    "Run": "bridge.run:Run",
    "RunConfig": "bridge.training:RunConfig",
    "Steer": "bridge.steering:Steer",
    "TorchSAE": "bridge.torch_sae:TorchSAE",
    "capture": "bridge.hooks:capture",
    "edit": "bridge.hooks:edit",
    "finetune": "bridge.finetuning:finetune",
    "load": "bridge.nanochat.checkpoint:load",
    "load_sae": "bridge.torch_sae:load",
    "load_saes": "bridge.runtime:load_saes",
    "to_jax": "bridge.handover:to_jax",
    "to_torch": "bridge.handover:to_torch",
    "train": "bridge.training:train",
}
"""Where every public name is: module:name."""

__all__ = [
    "FinetuneConfig",
    "InterpretableModel",
    "Nanochat",
    "Run",
    "RunConfig",
    "Steer",
    "TorchSAE",
    "capture",
    "edit",
    "finetune",
    "load",
    "load_sae",
    "load_saes",
    "to_jax",
    "to_torch",
    "train",
]

__getattr__, __dir__ = lazy.names(__name__, _PLACES)
