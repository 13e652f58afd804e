"""A description of an SAE in one table, under the names that nanochat-SAE gave it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.torch_sae import TorchSAE

_NAMES = {"standard": "relu"}


def create_neuronpedia_metadata(
    sae: "TorchSAE",
    config: Any = None,
    training_info: Mapping[str, Any] | None = None,
    eval_metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What an SAE is and how it came about.

    Args:
      sae: the exported SAE (`bridge.torch_sae.load`), which knows all but the coefficient of its sparsity penalty.
      config: what it was trained with (`jsae.architectures.SAEConfig`); without one, or where the architecture has no
        L1 penalty, the coefficient is None.
      training_info: anything about the training, such as the tokens.
      eval_metrics: anything measured, such as a hook's part of eval.json.

    Returns:
      "architecture" and "sparsity_config", and "training" and "evaluation" where they were given.
    """
    norms = sae.W_dec.float().norm(dim=-1)
    metadata: dict[str, Any] = {
        "architecture": {
            "type": _NAMES.get(sae.architecture, sae.architecture),
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "expansion_factor": sae.d_sae / sae.d_in,
            "normalize_decoder": bool(((norms - 1).abs() < 1e-4).all()),
        },
        "sparsity_config": {
            "k": sae.cfg.get("k"),
            "l1_coefficient": getattr(config, "l1_coefficient", None),
        },
    }
    given = {"training": training_info, "evaluation": eval_metrics}
    return metadata | {name: dict(value) for name, value in given.items() if value}
