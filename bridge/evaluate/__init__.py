"""What an exported SAE is worth: to the model, by the metrics of the field, and to a person who reads its latents.

`site` runs text up to a hook; `survey` sums what the SAE makes of activations, `splice` what the model makes of its
reconstructions, `latents` what each latent is like, `core` all of that under SAEBench's names; `text`, `syntax` and
`predicates` say what is known about a token, `labels`, `classes` and `probing` which latents know it. No jax here.
"""

from bridge.evaluate.core import measure
from bridge.evaluate.site import Site
from bridge.evaluate.survey import reconstruction

__all__ = ["Site", "measure", "reconstruction"]
