"""A store of activations on local disk or object storage: written once, trained on many times. No torch.

    store = jsae.store.write("acts", activations)      # or python -m experiments.collect
    store = jsae.store.open("gs://bucket/acts")
    sae = jsae.train(store, jsae.TopK.Config(d_in=768, d_sae=6144, k=32), jsae.TrainConfig(num_activations=10_000_000))

The names below are imported when they are first used: reading and writing need neither jax nor torch.
"""

from typing import TYPE_CHECKING

from jsae import lazy

if TYPE_CHECKING:
    from jsae.store.layout import Layout
    from jsae.store.manifest import IncompleteError, Manifest
    from jsae.store.reading import Store, open
    from jsae.store.source import SiteSource, StoreSource
    from jsae.store.statistics import Statistics
    from jsae.store.writer import Writer, write

_PLACES = {
    "IncompleteError": "jsae.store.manifest:IncompleteError",
    "Layout": "jsae.store.layout:Layout",
    "Manifest": "jsae.store.manifest:Manifest",
    "SiteSource": "jsae.store.source:SiteSource",
    "Statistics": "jsae.store.statistics:Statistics",
    "Store": "jsae.store.reading:Store",
    "StoreSource": "jsae.store.source:StoreSource",
    "Writer": "jsae.store.writer:Writer",
    "open": "jsae.store.reading:open",
    "write": "jsae.store.writer:write",
}
"""Modules of the public names, as module:name."""

__all__ = [
    "IncompleteError",
    "Layout",
    "Manifest",
    "SiteSource",
    "Statistics",
    "Store",
    "StoreSource",
    "Writer",
    "open",
    "write",
]

__getattr__, __dir__ = lazy.names(__name__, _PLACES)
