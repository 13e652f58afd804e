"""Train SAEs on the activations that a training of a nanochat computes anyway: `Watcher` and its settings.

The names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from jsae import lazy

if TYPE_CHECKING:
    from bridge.live.config import WatchConfig
    from bridge.live.watcher import Watcher

__all__ = ["WatchConfig", "Watcher"]

_PLACES = {"WatchConfig": "bridge.live.config:WatchConfig", "Watcher": "bridge.live.watcher:Watcher"}

__getattr__, __dir__ = lazy.names(__name__, _PLACES)
