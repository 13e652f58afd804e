"""A random SAE: the baseline that separates what training learned from what sparse nonlinear features give for free."""

import torch
from jaxtyping import Float

from bridge.torch_sae import TorchSAE

SEED = 0


@torch.no_grad()
def like(sae: TorchSAE, x: Float[torch.Tensor, "n d"]) -> TorchSAE:
    """Return a TopK SAE with random unit directions, as many as an SAE has latents and with the same L0.

    latents = the k largest of relu(R (x - mean)) of every token, with rows of R uniform on the unit sphere, `mean` that
    of the activations, and k the mean number of active latents of the SAE, rounded, at least 1. Decoder rows are the
    same directions.

    Args:
      sae: the SAE to compare with.
      x: activations for the mean and the L0.
    """
    x = x.float()
    active = (sae.encode(x) != 0).sum().item() / max(len(x), 1)
    rows = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(SEED))
    rows = torch.nn.functional.normalize(rows, dim=1).to(x.device)
    weights = {
        "W_enc": rows.T,
        "W_dec": rows,
        "b_enc": torch.zeros(sae.d_sae, device=x.device),
        "b_dec": x.mean(0) if len(x) else torch.zeros(sae.d_in, device=x.device),
    }
    k = min(max(round(active), 1), sae.d_sae)
    cfg = {"architecture": "topk", "d_in": sae.d_in, "d_sae": sae.d_sae, "k": k}
    return TorchSAE(cfg, weights).eval()
