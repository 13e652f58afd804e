"""Neuronpedia: its bulk export, SAEDashboard's batches, the upload, and the import into a local database."""

from typing import Any

_NAMES = {"NeuronpediaUploader": "upload", "create_neuronpedia_metadata": "metadata"}


def __getattr__(name: str) -> Any:
    # Imported lazily, so that checking an id does not import the upload.
    if name in _NAMES:
        import importlib

        return getattr(importlib.import_module(f"bridge.neuronpedia.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
