"""Lenses on a nanochat: what the residual stream after every layer says about the next token.

Four lenses: the logit lens, the exact direct path, the Jacobian lens and the tuned lens. `read` runs a model once,
`table` shows a lens on a text, `written` what a direction writes; `jacobian.fit` and `tuned.fit` fit lenses, `load`,
`save` and `merge` handle their files.
"""

from bridge.lenses.lens import DirectLens, JacobianLens, Lens, LogitLens, TunedLens, check_fits
from bridge.lenses.lens_file import load, merge, save
from bridge.lenses.paths import DirectPath, direct_paths
from bridge.lenses.streams import Streams, read, unembed
from bridge.lenses.tables import Table, Written, table, written

__all__ = [
    "DirectLens",
    "DirectPath",
    "JacobianLens",
    "Lens",
    "LogitLens",
    "Streams",
    "Table",
    "TunedLens",
    "Written",
    "check_fits",
    "direct_paths",
    "load",
    "merge",
    "read",
    "save",
    "table",
    "unembed",
    "written",
]
