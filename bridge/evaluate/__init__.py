"""Evaluate exported SAEs: the standard metrics, the effect on the model's loss, labels and probes of latents. No jax.

`site` runs text up to a hook; `survey` sums the errors of reconstructions, `splice` measures the model's loss with the
reconstruction in place of the activation, `latents` computes statistics per latent, and `core` combines them under
SAEBench's names. `text`, `syntax` and `predicates` describe tokens; `labels`, `classes` and `probing` relate latents to
these descriptions.
"""

from bridge.evaluate.core import measure
from bridge.evaluate.site import Site
from bridge.evaluate.survey import reconstruction

__all__ = ["Site", "measure", "reconstruction"]
