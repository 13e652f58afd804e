"""Lenses for a page without a server: tables of a few texts of the records, and what latents write through layers.

    explorer/records/lenses.json      of         model, lenses and SAEs: whether the file fits
                                      texts      a table per text and lens, as a server answers
                                      latents    by hook, the tokens that latents raise and lower by W_U J d, as columns

The page has them as they are (`bridge.explorer.page`).
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bridge import lenses
from bridge.explorer.weights import written_hook
from bridge.hooks import parse
from bridge.lenses import fitting, tables
from bridge.lenses.lens import JacobianLens, Lens
from bridge.nanochat import Nanochat
from bridge.run import Run
from bridge.torch_sae import TorchSAE
from jsae import files, jsons
from jsae.records.store import Store, Texts

TEXTS, TOKENS, TOP = 8, 48, 3
"""Texts of the records, tokens of each, BOS first, and the most likely tokens per cell."""
WRITTEN = 10
"""Tokens that a latent raises, and that it lowers."""
_COLUMNS = {"top": "<u2", "top_values": "<f4", "bottom": "<u2", "bottom_values": "<f4"}
_AT_ONCE = 256  # latents whose logits are in memory
_LARGEST = 2**30  # bytes of the file


def write(run: Run, nano: Nanochat, saes: Mapping[str, TorchSAE]) -> None:
    """Write the file of a run with records, unless one of the same model and lenses is there.

    Raises:
      ValueError: a fitted lens of the run is broken, or of another model; names its file.
      OSError: the file cannot be written.
    """
    of = {
        "fingerprint": nano.fingerprint,
        "lenses": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in run.lens_files},
        "hooks": {hook: run.records(hook).header.sae_sha256 for hook in saes},
    }
    file = run.lens_tables_file
    if file.is_file() and _of(run) == of:
        return
    every: list[Lens] = [lenses.LogitLens(nano.model), lenses.DirectLens(nano.model)]
    every += [fitting.load(nano, path) for path in run.lens_files]
    jacobian = next((lens for lens in every if isinstance(lens, JacobianLens)), None)
    texts = run.records(next(iter(saes))).texts
    latents = {hook: _latents(nano, hook, sae, jacobian) for hook, sae in saes.items()} if jacobian else {}
    content = {
        "of": of,
        "texts": [_tables(nano, every, texts, row) for row in _rows(texts)],
        "latents": {hook: columns for hook, columns in latents.items() if columns},
    }
    files.write(file, json.dumps(content, allow_nan=False, separators=(",", ":")))


def read(run: Run) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the tables by text and the columns by hook; nothing where there is no file.

    Raises:
      ValueError: the file is broken, or its columns are of other SAEs than the records.
    """
    file = run.lens_tables_file
    if not file.is_file():
        return [], {}
    try:
        content = jsons.read(file, _LARGEST)
        texts, latents = content["texts"], content["latents"]
        if not (isinstance(texts, list) and len(texts) <= TEXTS and all(map(_is_text, texts))):
            raise ValueError("it holds no tables of texts")
        for hook, columns in latents.items():
            _check_columns(columns, run.records(hook))
        return texts, latents
    except (KeyError, TypeError, AttributeError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{file} is broken, `python -m experiments.explore --run_dir={run.path}` writes it anew once it is moved "
            f"away: {error}"
        ) from error


def _of(run: Run) -> Any:
    """Return what an existing file belongs to; None if it is broken."""
    try:
        return jsons.read(run.lens_tables_file, _LARGEST)["of"]
    except (KeyError, TypeError, ValueError):
        return None


def _is_text(text: Any) -> bool:
    return isinstance(text, dict) and isinstance(text.get("ids"), list) and isinstance(text.get("lenses"), dict)


def _check_columns(columns: Mapping[str, Any], store: Store) -> None:
    for name, kind in _COLUMNS.items():
        size = len(base64.b64decode(columns[name], validate=True))
        expected = store.header.d_sae * WRITTEN * np.dtype(kind).itemsize
        if size != expected:
            raise ValueError(f"{name} of {store.header.hook} has {size} bytes instead of {expected}")


# ---- texts ---------------------------------------------------------------------------------------------------------


def _rows(texts: Texts) -> list[int]:
    """Return a few rows, as far apart as possible."""
    number = min(TEXTS, texts.header.rows)
    return [i * texts.header.rows // number for i in range(number)]


def _tables(nano: Nanochat, every: list[Lens], texts: Texts, row: int) -> dict[str, Any]:
    """Return the tables of one row of text by all lenses."""
    ids = torch.from_numpy(np.asarray(texts.tokens[row, :TOKENS]).astype(np.int64))
    ids = ids.to(nano.model.lm_head.weight.device)
    with torch.no_grad():
        streams = lenses.read(nano.model, ids[None])
        found = [tables.table(nano.model, lens, streams, ids, top=TOP) for lens in every]
    return {"row": row, "ids": ids.tolist(), "lenses": {one.lens: tables.as_json(one) for one in found}}


# ---- latents -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _latents(nano: Nanochat, hook: str, sae: TorchSAE, jacobian: JacobianLens) -> dict[str, Any] | None:
    """Return the columns of W_U J d for every latent; None where d is not in the stream or the lens lacks the layer.

    Values are minus the mean over the vocabulary, as `bridge.lenses.written` gives them.
    """
    layer, site = parse(written_hook(hook, sae))
    if site == "mlp_in" or layer not in jacobian.layers:
        return None
    gpt = nano.model
    W_U = gpt.lm_head.weight[: nano.config.vocab_size].float()
    through = W_U @ jacobian.matrices[layer].to(W_U)
    through -= through.mean(0)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in _COLUMNS}
    for rows in sae.W_dec.to(W_U).split(_AT_ONCE):
        logits = rows @ through.T
        top, bottom = logits.topk(WRITTEN), logits.topk(WRITTEN, largest=False)
        for name, values in zip(_COLUMNS, (*reversed(top), *reversed(bottom)), strict=True):
            parts[name].append(values)
    columns = {
        name: base64.b64encode(torch.cat(values).cpu().numpy().astype(_COLUMNS[name]).tobytes()).decode()
        for name, values in parts.items()
    }
    return columns | {"layer": layer, "n_prompts": jacobian.n_prompts, "skips_mlp": site == "attn"}
