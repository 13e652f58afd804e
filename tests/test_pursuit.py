"""Matching pursuit on exported SAEs, in JAX and in torch, against the real sae-lens's matching_pursuit SAE."""

import numpy as np
import pytest
import torch
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

from bridge.run.subjects import Choice, _with_encoder
from bridge.torch_sae import TorchSAE
from experiments.evaluate import EvaluateConfig
from jsae.saelens import Plain
from jsae.settings import ConfigError
from jsae.trained import TrainedSAE

D, F, N = 16, 48, 64


def plain(architecture: str = "topk", norms: float | np.ndarray = 1.0) -> Plain:
    random = np.random.default_rng(0)
    rows = random.standard_normal((F, D))
    W_dec = rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.broadcast_to(norms, F)[:, None]
    weights = {"W_enc": W_dec.T, "W_dec": W_dec, "b_dec": random.standard_normal(D), "b_enc": random.standard_normal(F)}
    cfg = {"architecture": architecture, "d_in": D, "d_sae": F, "metadata": {}}
    cfg |= {"k": 4} if architecture == "topk" else {}
    if "transcoder" in architecture:
        cfg["d_out"] = D
    return Plain(cfg, {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}, 1)


def both(of: Plain) -> tuple[TrainedSAE, TorchSAE]:
    return TrainedSAE(of), TorchSAE(of.cfg, {name: torch.from_numpy(weight) for name, weight in of.weights.items()})


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((*shape, D)).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_latents_are_those_of_saelens(k, threshold):
    of, x = plain(), inputs(N)
    theirs = MatchingPursuitSAE(
        MatchingPursuitSAEConfig(d_in=D, d_sae=F, residual_threshold=threshold, max_iterations=k)
    )
    with torch.no_grad():
        theirs.W_dec.copy_(torch.from_numpy(of.weights["W_dec"]))
        theirs.b_dec.copy_(torch.from_numpy(of.weights["b_dec"]))
        expected = theirs.encode(torch.from_numpy(x)).numpy()
    in_jax, in_torch = both(of)
    for latents in (
        np.asarray(in_jax.pursue(x, k, threshold)),
        in_torch.pursue(torch.from_numpy(x), k, threshold).numpy(),
    ):
        np.testing.assert_array_equal(latents != 0, expected != 0)
        np.testing.assert_allclose(latents, expected, atol=2e-5)
    assert (expected != 0).sum(1).max() <= k
    assert len(set((expected != 0).sum(1))) > 1 or k == 1


def test_norms_of_decoder_rows_do_not_change_the_reconstruction():
    x = inputs(4, 8)
    unit, other = (both(plain(norms=norms)) for norms in (1.0, np.linspace(0.5, 2, F)))
    for a, b in zip(unit, other, strict=True):
        x_of = torch.from_numpy(x) if isinstance(a, TorchSAE) else x
        values = [np.asarray(s.decode(s.pursue(x_of, 5))) for s in (a, b)]
        assert values[0].shape == (4, 8, D)
        np.testing.assert_allclose(*values, atol=1e-5)


def test_it_reconstructs_better_than_the_encoder_at_the_same_number_of_latents():
    sae = both(plain())[1]
    x = torch.from_numpy(inputs(N))
    pursuing = sae.with_encoder("matching_pursuit")
    assert pursuing.pursued == 4
    with torch.no_grad():
        errors = [(s(x) - x).square().sum() for s in (sae, pursuing)]
        assert errors[1] < 0.8 * errors[0]
        torch.testing.assert_close(pursuing(x), pursuing.decode(pursuing.encode(x)))
        values, indices = pursuing.encode_sparse(x, 4)
        torch.testing.assert_close(pursuing.decode_sparse(values, indices), pursuing(x))
    assert sae.pursued is None


def test_another_k_of_its_own_encoder():
    sae, x = both(plain())[1], torch.from_numpy(inputs(N))
    with torch.no_grad():
        assert int((sae.with_encoder(k=2).encode(x) != 0).sum(1).max()) <= 2
        torch.testing.assert_close(sae.with_encoder(k=2)(x), sae.decode_sparse(*sae.encode_sparse(x, 2)))
    assert sae.cfg["k"] == 4


@pytest.mark.parametrize(
    ("architecture", "encoder", "k", "message"),
    [
        ("standard", "own", 3, "selects no k latents"),
        ("standard", "matching_pursuit", None, "give k from 1 to d_sae, which is 48"),
        ("topk", "matching_pursuit", 49, "k is 49"),
        ("topk", "own", 0, "k is 0"),
        ("transcoder", "matching_pursuit", 3, "a transcoder has none"),
    ],
)
def test_what_an_sae_cannot_have_is_refused(architecture, encoder, k, message, tmp_path):
    sae = both(plain(architecture))[1]
    with pytest.raises(ValueError, match=message):
        sae.with_encoder(encoder, k)
    with pytest.raises(ValueError, match=rf"{tmp_path} with --encoder={encoder}: .*{message}"):
        _with_encoder(Choice((tmp_path,), encoder=encoder, encoder_k=k), tmp_path, sae)


def test_jax_refuses_the_same():
    with pytest.raises(ValueError, match="a transcoder has none"):
        TrainedSAE(plain("transcoder")).pursue(inputs(2), 3)
    with pytest.raises(ValueError, match="at least 1 latent"):
        TrainedSAE(plain()).pursue(inputs(2), 0)


def test_the_command_does_not_replace_the_results_of_the_own_encoder():
    with pytest.raises(ConfigError, match="give an --output_dir"):
        EvaluateConfig(run_dir="runs/x", encoder="matching_pursuit")
    with pytest.raises(ConfigError, match="give an --output_dir"):
        EvaluateConfig(run_dir="runs/x", encoder_k=3)
    assert EvaluateConfig(run_dir="runs/x", encoder="matching_pursuit", output_dir="runs/y").encoder_k is None
    assert EvaluateConfig(compare=("a", "b"), encoder_k=3).encoder_k == 3
