"""A description of an SAE as a dict, with the field names of the nanochat-SAE project."""

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
    """Return a description of an SAE and its training.

    Args:
      sae: the exported SAE (`bridge.torch_sae.load`).
      config: its configuration (`jsae.architectures.SAEConfig`), for the coefficient of the L1 penalty; without it, or
        if the architecture has no L1 penalty, the coefficient is None.
      training_info: information on the training, such as the number of tokens.
      eval_metrics: metrics, such as those of one hook in eval.json.

    Returns:
      "architecture", "sparsity_config", and, if given, "training" and "evaluation".
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
    optional = {"training": training_info, "evaluation": eval_metrics}
    return metadata | {name: dict(value) for name, value in optional.items() if value}
