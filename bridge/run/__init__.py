"""The directory of a run: its layout, settings, model, SAEs and results."""

from bridge.run.run import Run

__all__ = ["Run"]
