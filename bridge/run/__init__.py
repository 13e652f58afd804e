"""The directory of a run: its layout, its settings, its SAEs and what was made of them."""
