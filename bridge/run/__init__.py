"""The directory of a run: its layout, its settings, its model, its SAEs and what was made of them."""

from bridge.run.run import Run

__all__ = ["Run"]
