"""Project decoder directions to two dimensions, so that latents that write alike lie close to each other."""

import importlib.util

import numpy as np
from jaxtyping import Float, Float32

MOST = 8192
"""Most latents of a map: t-SNE of more takes minutes."""
_PERPLEXITY = 20


def project(W_dec: Float[np.ndarray, "f d"]) -> Float32[np.ndarray, "f 2"] | None:
    """Return a place for every latent in the square from 0 to 1, by t-SNE (van der Maaten and Hinton, 2008) of cosines.

    Distances between far groups have no meaning. Returns None for fewer than 8 latents, for more than `MOST`, and
    without scikit-learn (extra [eval]).
    """
    if not 8 <= len(W_dec) <= MOST or importlib.util.find_spec("sklearn") is None:
        return None
    from sklearn.manifold import TSNE

    norms = np.linalg.norm(W_dec, axis=1, keepdims=True)
    rows = W_dec / np.where(norms > 0, norms, 1)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="random", random_state=0).fit_transform(rows)
    low, high = places.min(axis=0), places.max(axis=0)
    return ((places - low) / np.maximum(high - low, np.finfo(np.float32).tiny)).astype(np.float32)
