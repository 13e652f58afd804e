"""Read where latents come from, which `experiments.provenance` wrote, for the page: `origins-H.js` of hook number H."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from bridge.run import Run, exports
from jsae import jsons
from jsae.records.store import Store

_MOST = 10  # entries of a table on the page
_LARGEST = 2**24  # bytes of a file
_CONTEXT = {"text_before": str, "at": str, "text_after": str}
_SOURCE = {"file": str, "part": str, "document": int}
_TABLES: dict[str, dict[str, type]] = {
    "documents": {"total": float, "fired": int, "tokens": int} | _SOURCE | _CONTEXT,
    "files": {"file": str, "total": float, "fired": int, "tokens": int, "density": float},
    "tokens": {"token": str, "occurrences": int, "mean_fall": float, "total_fall": float},
    "occurrences": {"predicted": str, "before": float, "after": float} | _SOURCE | _CONTEXT,
}


def of_hook(run: Run, store: Store) -> dict[int, dict[str, Any]]:
    """Return what the page shows of the latents of a hook that were traced, by latent.

    Files of an earlier crosscoder are left out, with a note on stderr.

    Raises:
      ValueError: a file is broken; names the command that writes it anew.
    """
    hook = store.header.hook
    if store.header.settings.get("stage") is None:
        return {}
    sha256 = exports.known_digest(run.sae_folder(hook))
    found = {}
    for latent in range(store.header.d_sae):
        file = run.provenance_file(hook, latent)
        if not file.is_file():
            continue
        command = f"`python -m experiments.provenance --run_dir={run.path} --latent={latent}` writes it anew"
        try:
            origin = _checked(jsons.read(file, _LARGEST))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is broken, {command}: {type(error).__name__}: {error}") from error
        if sha256 not in (None, origin.pop("sha256")):
            print(f"note: {file} is of an earlier crosscoder, and is not shown: {command}", file=sys.stderr)
        else:
            found[latent] = origin
    return found


def _checked(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a file that the page shows, with values of the right types."""
    losses = {name: _losses(origin["loss"][name]) for name in ("where_it_fires", "elsewhere")}
    return {
        "sha256": origin["sha256"],
        "from": str(origin["grew"]["from"]),
        "to": str(origin["grew"]["to"]),
        "note": str(origin["text"]["note"]),
        "read": {name: int(origin["text"][name]) for name in ("documents", "tokens")},
        "fired": int(origin["fired"]),
        "loss": losses,
        **{
            name: [{key: kind(row[key]) for key, kind in columns.items()} for row in origin[name][:_MOST]]
            for name, columns in _TABLES.items()
        },
    }


def _losses(loss: Mapping[str, Any]) -> list[float] | None:
    """Return the losses of both checkpoints; None where nothing was measured."""
    return None if loss["before"] is None else [float(loss["before"]), float(loss["after"])]
