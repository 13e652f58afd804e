"""Activations whitened by their covariance (arXiv 2511.13981), and SAEs of these as SAEs of the activations.

An SAE of whitened activations minimises another error than FVU: every principal component counts the same. Its export
holds the transformation as SAELens writes it (`normalize_activations` of "covariance_whitening"), which is folded into
the weights where it is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from experiments.benches.quality_subjects import Scores, Subject
from jsae.saelens.settings import CFG, SCALER, WHITENING

_LEAST = 1e-3  # added to the eigenvalues, as SAELens does
_ROWS = 65536  # transformed at once


@functools.lru_cache(maxsize=1)  # one recipe after the other is trained on the same data
def whitened(subject: Subject, folder: Path) -> Subject:
    """Write the whitened training data of a subject; return the subject of SAEs that are trained on them.

    z = (x - mean) E diag(lambda + 1e-3)^(-1/2), with the covariance E diag(lambda) E^T of the training data. Scores are
    of the activations themselves.

    Args:
      subject: its training data are in `train.npy`.
      folder: to write to.
    """
    acts = np.load(subject.folder / "train.npy", mmap_mode="r")
    parts = [slice(start, start + _ROWS) for start in range(0, len(acts), _ROWS)]
    mean = sum(acts[part].sum(0, dtype=np.float64) for part in parts) / len(acts)
    centred = (acts[part] - mean for part in parts)
    eigenvalues, vectors = np.linalg.eigh(sum(x.T @ x for x in centred) / (len(acts) - 1))
    sizes = np.sqrt(np.maximum(eigenvalues, 0) + _LEAST)
    transform = {"mean": mean, "matrix": vectors / sizes, "inverse_matrix": sizes[:, None] * vectors.T}
    folder.mkdir(exist_ok=True)
    changed = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float32, acts.shape)
    for part in parts:
        changed[part] = (acts[part] - mean) @ transform["matrix"]
    changed.flush()

    def scores(export: Path) -> Scores:
        _fold(export, transform)
        return subject.scores(export)

    return dataclasses.replace(subject, folder=folder, scores=scores)


def _fold(export: Path, transform: dict[str, np.ndarray]) -> None:
    """Add the transformation to an export."""
    from safetensors.numpy import save_file

    cfg = json.loads((export / CFG).read_text())
    (export / CFG).write_text(json.dumps(cfg | {"normalize_activations": "covariance_whitening"}))
    (export / SCALER).write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
    save_file({name: np.ascontiguousarray(array) for name, array in transform.items()}, export / WHITENING)
