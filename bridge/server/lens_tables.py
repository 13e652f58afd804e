"""Read lenses on a client's text, and what a latent's direction writes by each lens."""

from collections.abc import Sequence
from typing import Any

import torch

from bridge import lenses
from bridge.hooks import parse
from bridge.lenses import tables
from bridge.lenses.lens import JacobianLens
from bridge.server.bodies import Refusal
from bridge.server.session import Session

_WRITTEN = 20
"""Tokens that a direction raises, and that it lowers, in an answer."""


async def table(session: Session, ids: Sequence[int], name: str, top: int) -> dict[str, Any]:
    """Return a lens on a text, rows from the first layer to the model's own output; every row takes its own turn.

    Args:
      session: the model and its lenses.
      ids: the text, BOS first.
      name: of the lens.
      top: tokens per cell.
    """
    model = session.im.model
    tokens = torch.tensor(ids, device=model.lm_head.weight.device)
    streams = await session.run(lenses.read, model, tokens[None])
    rows, remaining = [], tables.table_rows(model, session.lenses[name], streams, tokens, top=top)
    while (row := await session.run(next, remaining, None)) is not None:
        rows.append(row)
    return tables.as_json(tables.assembled(name, rows))


def written(session: Session, hook: str, index: int) -> dict[str, Any]:
    """Return the tokens that a latent's decoder row raises and lowers by each lens, and how far the lenses agree.

    Raises:
      Refusal: the SAE reads what an MLP reads, which is not in the residual stream.
    """
    layer, site = parse(hook)
    if site == "mlp_in":
        raise Refusal(400, f"an SAE of {hook} reads what the MLP reads: its directions are not in the residual stream")
    jacobian = session.lenses.get("jacobian")
    assert jacobian is None or isinstance(jacobian, JacobianLens)
    found = lenses.written(session.im.model, session.im.sae(hook).W_dec[index], layer, jacobian, _WRITTEN)
    return {
        "layer": layer,
        "factor": lenses.direct_paths(session.im.model)[layer].own,
        "n_prompts": None if jacobian is None else jacobian.n_prompts,
        "overlap": found[0].overlap(found[1]) if len(found) > 1 else None,
        "skips_mlp": site == "attn",
        "lenses": [
            {
                "name": one.lens,
                "top": one.top.tolist(),
                "top_values": tables.rounded(one.top_values),
                "bottom": one.bottom.tolist(),
                "bottom_values": tables.rounded(one.bottom_values),
            }
            for one in found
        ],
    }
